// Android's published signature (API 35), so that the module compiles where there is no Android SDK. Nothing here runs.
package android.os;

public final class SharedMemory implements java.io.Closeable {
    SharedMemory() {}

    public static SharedMemory create(String name, int size) throws android.system.ErrnoException { throw new RuntimeException("Stub!"); }

    public java.nio.ByteBuffer mapReadWrite() throws android.system.ErrnoException { throw new RuntimeException("Stub!"); }

    public static void unmap(java.nio.ByteBuffer buffer) { throw new RuntimeException("Stub!"); }

    public void close() { throw new RuntimeException("Stub!"); }
}
