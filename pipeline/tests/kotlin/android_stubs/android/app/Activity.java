// Android's published signature (API 35), so that the module compiles where there is no Android SDK. Nothing here runs.
package android.app;

public class Activity extends android.content.Context {
    protected void onCreate(android.os.Bundle savedInstanceState) { throw new RuntimeException("Stub!"); }

    protected void onDestroy() { throw new RuntimeException("Stub!"); }

    public void setContentView(android.view.View view) { throw new RuntimeException("Stub!"); }

    public android.content.res.AssetManager getAssets() { throw new RuntimeException("Stub!"); }

    public java.io.File getNoBackupFilesDir() { throw new RuntimeException("Stub!"); }

    public java.io.File getCacheDir() { throw new RuntimeException("Stub!"); }

    public android.content.Context getApplicationContext() { throw new RuntimeException("Stub!"); }
}
