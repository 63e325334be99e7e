package pocketlm

import java.io.Closeable
import java.nio.Buffer
import java.nio.ByteBuffer
import java.nio.ByteOrder

/** A model with its KV cache, batch 1. The logits `[vocab]` that it returns are overwritten by the next call. Not for several threads. */
interface Session : Closeable {
    val sizes: Interface

    /** Tokens that the cache holds. */
    val position: Int

    /** Appends [ids] and gives the logits after the last; between chunks [pause] may throw to end it. */
    fun prefill(ids: IntArray, pause: () -> Unit = {}): FloatArray

    /** Appends one token and gives the logits after it. */
    fun step(id: Int): FloatArray

    /** Holds the first [position] tokens only. */
    fun rewind(position: Int)
}

/** Where native memory comes from. On Android `allocateDirect` counts against the app's Java heap: see `SharedBuffers` there. */
interface NativeBuffers {
    /** [bytes] zeros in the processor's byte order. */
    fun allocate(bytes: Int): ByteBuffer

    /** Gives a buffer of [allocate] back; it must not be used any more. */
    fun free(buffer: ByteBuffer)
}

/** Plain direct buffers, which the garbage collector frees. */
object DirectBuffers : NativeBuffers {
    override fun allocate(bytes: Int): ByteBuffer = ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder())

    override fun free(buffer: ByteBuffer) = Unit
}

/** Moves a buffer to [place]. Through Buffer: that ByteBuffer's own method returns a ByteBuffer is not so on every Android. */
internal fun Buffer.seek(place: Int) {
    position(place)
}

/** Shows a buffer from [begin] to [end] alone. */
internal fun Buffer.show(begin: Int, end: Int) {
    limit(end)
    position(begin)
}

/** ModelException unless [ids] are of the vocabulary and fit the context: a runtime would read foreign memory. */
internal fun Session.check(ids: IntArray) {
    if (ids.isEmpty()) throw ModelException("an empty prompt; give at least one token")
    if (position + ids.size > sizes.contextTokens) {
        throw ModelException("${position + ids.size} tokens do not fit the context of ${sizes.contextTokens}; give a shorter text")
    }
    ids.find { it < 0 || it >= sizes.vocabSize }?.let {
        throw ModelException("token id $it, the model has ${sizes.vocabSize}; check the tokenizer")
    }
}

/** Key and value of every layer in turn, as the ONNX tensors' names end. */
internal fun Interface.cacheNames(): List<String> = (0 until layers).flatMap { listOf("$it.key", "$it.value") }
