package pocketlm

import java.nio.ByteBuffer
import org.tensorflow.lite.DataType
import org.tensorflow.lite.Interpreter

/** Opens a TFLite artifact. */
internal fun openSession(files: ModelFiles, options: OpenOptions): Session {
    if (files.artifact.format != "tflite") {
        throw ModelException("${files.artifact.file}: this library was built for LiteRT; set pocketlm.artifact in gradle.properties")
    }
    return LiteRtSession(files, options)
}

/**
 * LiteRT's Interpreter: static shapes, a signature `decode` and one or more for prompts, all over one set of weights. The cache is
 * owned here and masked, not moved: each call returns new slices, which are written at their positions.
 */
internal class LiteRtSession(files: ModelFiles, options: OpenOptions) : Session {
    override val sizes: Interface = files.artifact.sizes
    override var position = 0
        private set

    private val name = files.artifact.name
    private val prefills = files.artifact.prefills
    private val buffers = options.buffers
    private val interpreter: Interpreter
    private val caches: Map<String, ByteBuffer>
    private val calls = HashMap<String, Call>() // buffers of a prompt signature are made when it is first used
    private val logits = FloatArray(sizes.vocabSize)

    init {
        try {
            interpreter = Interpreter(files.model, Interpreter.Options().setNumThreads(options.threads).setUseXNNPACK(true))
        } catch (error: IllegalArgumentException) {
            throw ModelException("LiteRT cannot open ${files.model.name}: ${error.message}", error)
        }
        caches = (0 until sizes.layers).flatMap { listOf("k_$it", "v_$it") }
            .associateWith { buffers.allocate(Float.SIZE_BYTES * sizes.cacheNumbers) }
        val differing = signatures().firstNotNullOfOrNull { (signature, tokens) -> difference(signature, tokens) }
        if (differing != null) {
            close()
            throw ModelException("$name: $differing; take the bundle again")
        }
    }

    override fun prefill(ids: IntArray, pause: () -> Unit): FloatArray {
        check(ids)
        var start = 0
        for (length in promptCalls(ids.size, prefills.map { it.tokens })) {
            if (start > 0) pause()
            val part = ids.copyOfRange(start, minOf(ids.size, start + length))
            run(prefills.first { it.tokens == length }.signature, length, part)
            start += part.size
        }
        return logits
    }

    override fun step(id: Int): FloatArray {
        val ids = intArrayOf(id)
        check(ids)
        run(DECODE, 1, ids)
        return logits
    }

    /** Zeros behind [position], because a hidden slot still weighs exp(-30) and old keys could be large. */
    override fun rewind(position: Int) {
        val zeros = ByteArray(Float.SIZE_BYTES * sizes.headDim * (sizes.contextTokens - position))
        for (cache in caches.values) for (head in 0 until sizes.kvHeads) {
            cache.seek(Float.SIZE_BYTES * sizes.headDim * (head * sizes.contextTokens + position))
            cache.put(zeros)
        }
        this.position = position
    }

    override fun close() {
        interpreter.close()
        calls.values.forEach { it.free(buffers) }
        caches.values.forEach(buffers::free)
    }

    /** Appends [ids] by a signature of [tokens], filled up on the right. */
    private fun run(signature: String, tokens: Int, ids: IntArray) {
        val call = calls.getOrPut(signature) { Call(sizes, tokens, signature != DECODE, buffers) }
        call.fill(ids, position)
        val inputs = HashMap<String, Any>(call.inputs)
        for ((cache, buffer) in caches) inputs[cache] = buffer.also { it.seek(0) }
        call.outputs.values.forEach { it.seek(0) }
        try {
            interpreter.runSignature(inputs, HashMap<String, Any>(call.outputs), signature)
        } catch (error: IllegalArgumentException) {
            throw ModelException("LiteRT could not run $name at token $position: ${error.message}", error)
        }
        for ((cache, buffer) in caches) append(call.outputs.getValue("new_$cache"), tokens, buffer, ids.size)
        call.outputs.getValue("logits").also { it.seek(0) }.asFloatBuffer().get(logits)
        position += ids.size
    }

    /** Copies the first [count] of [tokens] new slices `[1, kvHeads, tokens, headDim]` to their positions. */
    private fun append(fresh: ByteBuffer, tokens: Int, cache: ByteBuffer, count: Int) {
        val slot = Float.SIZE_BYTES * sizes.headDim
        for (head in 0 until sizes.kvHeads) {
            fresh.show(slot * head * tokens, slot * (head * tokens + count))
            cache.seek(slot * (head * sizes.contextTokens + position))
            cache.put(fresh)
        }
        fresh.show(0, fresh.capacity())
    }

    private fun signatures(): Map<String, Int> = prefills.associate { it.signature to it.tokens } + (DECODE to 1)

    /** What of a signature is not as the manifest says, or null. Tensors of another type would be read as other numbers. */
    private fun difference(signature: String, tokens: Int): String? {
        val cache = listOf(1, sizes.kvHeads, sizes.contextTokens, sizes.headDim)
        val wanted = caches.keys.associateWith { cache } + mapOf(
            "tokens" to listOf(1, tokens),
            "positions" to listOf(1, tokens),
            "mask" to listOf(1, 1, tokens, sizes.contextTokens + tokens),
        ) + (if (signature == DECODE) emptyMap() else mapOf("last" to listOf(1)))
        val found = interpreter.getSignatureInputs(signature).toSet()
        if (found != wanted.keys) return "signature $signature has other inputs: ${(found - wanted.keys) + (wanted.keys - found)}"
        for ((input, shape) in wanted) {
            val tensor = interpreter.getInputTensorFromSignature(input, signature)
            val type = if (input in INTEGERS) DataType.INT32 else DataType.FLOAT32
            if (tensor.shape().toList() != shape || tensor.dataType() != type) {
                return "input $input of $signature is ${tensor.dataType()} ${tensor.shape().toList()}, not $type $shape"
            }
        }
        return null
    }

    internal companion object {
        const val DECODE = "decode"
        val INTEGERS = setOf("tokens", "positions", "last")
    }
}

/** Inputs and outputs of one signature but for the caches, in buffers that are used again. */
private class Call(private val sizes: Interface, private val tokens: Int, prompt: Boolean, buffers: NativeBuffers) {
    private val width = sizes.contextTokens + tokens
    val inputs: Map<String, ByteBuffer> = (
        mapOf("tokens" to tokens, "positions" to tokens, "mask" to tokens * width) + (if (prompt) mapOf("last" to 1) else emptyMap())
        ).mapValues { (_, count) -> buffers.allocate(Float.SIZE_BYTES * count) } // Int and Float have the same size
    val outputs: Map<String, ByteBuffer> = (
        mapOf("logits" to sizes.vocabSize) + (0 until sizes.layers).flatMap { listOf("new_k_$it", "new_v_$it") }
            .associateWith { sizes.kvHeads * tokens * sizes.headDim }
        ).mapValues { (_, count) -> buffers.allocate(Float.SIZE_BYTES * count) }
    private var visible = -1 // cache slots that the mask shows

    init {
        val mask = inputs.getValue("mask").asFloatBuffer()
        for (row in 0 until tokens) {
            val seen = sizes.contextTokens..sizes.contextTokens + row // itself and what comes before it in this call
            for (column in 0 until width) mask.put(row * width + column, if (column in seen) 0f else HIDDEN)
        }
    }

    /** Puts [ids] at [position]; what fills up keeps a position that the model has, and is hidden by what comes before it. */
    fun fill(ids: IntArray, position: Int) {
        val (tokenIds, positions) = inputs.getValue("tokens").asIntBuffer() to inputs.getValue("positions").asIntBuffer()
        for (place in 0 until tokens) {
            tokenIds.put(place, if (place < ids.size) ids[place] else 0)
            positions.put(place, minOf(position + place, sizes.contextTokens - 1))
        }
        inputs["last"]?.putInt(0, ids.size - 1)
        show(position)
        inputs.values.forEach { it.seek(0) }
    }

    fun free(buffers: NativeBuffers) = (inputs.values + outputs.values).forEach(buffers::free)

    /** Shows the first [slots] of the cache to every token, hides the others. Only what changed is written. */
    private fun show(slots: Int) {
        val mask = inputs.getValue("mask").asFloatBuffer()
        val changed = if (visible < 0) 0 until sizes.contextTokens else minOf(slots, visible) until maxOf(slots, visible)
        for (row in 0 until tokens) for (column in changed) mask.put(row * width + column, if (column < slots) 0f else HIDDEN)
        visible = slots
    }

    private companion object {
        const val HIDDEN = -30f // not a larger number: quantised attention has to represent it
    }
}
