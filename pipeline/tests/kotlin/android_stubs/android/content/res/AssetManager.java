// Android's published signature (API 35), so that the module compiles where there is no Android SDK. Nothing here runs.
package android.content.res;

public final class AssetManager implements AutoCloseable {
    public static final int ACCESS_STREAMING = 2;

    AssetManager() {}

    public String[] list(String path) throws java.io.IOException { throw new RuntimeException("Stub!"); }

    public java.io.InputStream open(String fileName) throws java.io.IOException { throw new RuntimeException("Stub!"); }

    public java.io.InputStream open(String fileName, int accessMode) throws java.io.IOException { throw new RuntimeException("Stub!"); }

    public void close() { throw new RuntimeException("Stub!"); }
}
