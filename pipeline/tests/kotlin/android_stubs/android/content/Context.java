// Android's published signature (API 35), so that the module compiles where there is no Android SDK. Nothing here runs.
package android.content;

public abstract class Context {
    public abstract android.content.res.AssetManager getAssets();

    public abstract java.io.File getNoBackupFilesDir();

    public abstract java.io.File getCacheDir();

    public abstract Context getApplicationContext();

    public final String getString(int resId) { throw new RuntimeException("Stub!"); }

    public final String getString(int resId, Object... formatArgs) { throw new RuntimeException("Stub!"); }
}
