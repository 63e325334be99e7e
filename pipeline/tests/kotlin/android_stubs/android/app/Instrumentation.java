// Android's published signature (API 35), so that the module compiles where there is no Android SDK. Nothing here runs.
package android.app;

public class Instrumentation {
    public android.content.Context getContext() { throw new RuntimeException("Stub!"); }

    public android.content.Context getTargetContext() { throw new RuntimeException("Stub!"); }
}
