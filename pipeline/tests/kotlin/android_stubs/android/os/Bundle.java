// Android's published signature (API 35), so that the module compiles where there is no Android SDK. Nothing here runs.
package android.os;

public final class Bundle {
    public String getString(String key) { throw new RuntimeException("Stub!"); }
}
