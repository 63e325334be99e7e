package pocketlm

import android.os.Build
import android.os.SharedMemory
import android.system.ErrnoException
import java.nio.ByteBuffer
import java.nio.ByteOrder

/**
 * Memory outside the Java heap. Android counts `ByteBuffer.allocateDirect` against the app's heap limit (often 256 MB), which the cache
 * of a long context would fill; anonymous shared memory is not counted. It came with Android 8.1; older ones get direct buffers.
 */
object SharedBuffers : NativeBuffers {
    override fun allocate(bytes: Int): ByteBuffer {
        if (Build.VERSION.SDK_INT < Build.VERSION_CODES.O_MR1) return DirectBuffers.allocate(bytes)
        try {
            return SharedMemory.create("pocketlm", bytes).use { it.mapReadWrite() }.order(ByteOrder.nativeOrder()) // it outlives the file
        } catch (error: ErrnoException) {
            throw ModelException("${bytes / 1_000_000} MB of memory cannot be had (${error.message}); take a smaller model or context", error)
        }
    }

    override fun free(buffer: ByteBuffer) {
        if (Build.VERSION.SDK_INT >= Build.VERSION_CODES.O_MR1) SharedMemory.unmap(buffer)
    }
}

/** What [OpenOptions] takes where nothing else is given. */
internal val platformBuffers: NativeBuffers get() = SharedBuffers
