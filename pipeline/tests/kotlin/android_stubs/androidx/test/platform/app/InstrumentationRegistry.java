// Android's published signature (API 35), so that the module compiles where there is no Android SDK. Nothing here runs.
package androidx.test.platform.app;

public final class InstrumentationRegistry {
    public static android.app.Instrumentation getInstrumentation() { throw new RuntimeException("Stub!"); }

    public static android.os.Bundle getArguments() { throw new RuntimeException("Stub!"); }
}
