package pocketlm

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OnnxTensorLike
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtLoggingLevel
import ai.onnxruntime.OrtSession
import java.io.File
import java.nio.ByteBuffer
import java.nio.FloatBuffer
import java.nio.LongBuffer

/** Key and value buffers `[1, kvHeads, contextTokens, headDim]` of every layer. */
internal class Caches(artifact: Artifact, private val buffers: NativeBuffers) : AutoCloseable {
    private val sizes = artifact.sizes
    private val type = when (artifact.cacheType) {
        "float32" -> OnnxJavaType.FLOAT
        "int8" -> OnnxJavaType.INT8
        else -> throw ModelException("${artifact.name}: its KV cache is ${artifact.cacheType}, this library knows float32 and int8")
    }
    private val memory = sizes.cacheNames().associateWith { buffers.allocate(type.size * sizes.cacheNumbers) }
    private val tensors = memory.mapValues { (_, buffer) -> tensor(buffer, type, 1, sizes.kvHeads, sizes.contextTokens, sizes.headDim) }
    private val ones = buffers.allocate(Long.SIZE_BYTES * sizes.contextTokens).also { buffer ->
        for (place in 0 until sizes.contextTokens) buffer.putLong(Long.SIZE_BYTES * place, 1)
    }
    private val inputs = tensors.mapKeysTo(HashMap()) { "past_key_values.${it.key}" }
    private val present = tensors.mapKeys { "present.${it.key}" }
    private val presentAndLogits = HashMap(present)

    /** Everything that a graph reads. The map is the same in every call, so that a token makes no new one. */
    fun inputs(ids: OnnxTensor, mask: OnnxTensor): Map<String, OnnxTensor> = inputs.also {
        it["input_ids"] = ids
        it["attention_mask"] = mask
    }

    /** Everything that a graph writes: the caches themselves, and the logits where they are wanted. */
    fun outputs(logits: OnnxTensor?): Map<String, OnnxTensor> =
        if (logits == null) present else presentAndLogits.also { it["logits"] = logits }

    /** The attention mask `[1, length]`. */
    fun mask(length: Int): OnnxTensor = tensor(ones.asLongBuffer().also { it.show(0, length) }, 1, length)

    /** Keys and values of the first [tokens] as bytes, for a comparison. */
    fun first(tokens: Int): ByteArray {
        val slot = type.size * sizes.headDim
        val found = ByteArray(memory.size * sizes.kvHeads * tokens * slot)
        var place = 0
        for (buffer in memory.values) for (head in 0 until sizes.kvHeads) {
            buffer.seek(head * sizes.contextTokens * slot)
            buffer.get(found, place, tokens * slot)
            buffer.seek(0)
            place += tokens * slot
        }
        return found
    }

    override fun close() {
        tensors.values.forEach { it.close() }
        memory.values.forEach(buffers::free)
        buffers.free(ones)
    }
}

/** How a graph is opened. [hybrid]: there is another one beside it. [given]: matrices that it has to be handed, by name. */
internal class GraphOptions(val threads: Int, val hybrid: Boolean, val given: Map<String, OnnxTensorLike> = emptyMap())

/** A graph of the ONNX tensor contract. */
internal class Graph(file: File, sizes: Interface, asked: GraphOptions) : AutoCloseable {
    private val options = OrtSession.SessionOptions()
    private val session: OrtSession

    init {
        try {
            options.setIntraOpNumThreads(asked.threads)
            options.setInterOpNumThreads(1)
            options.addConfigEntry("session.use_device_allocator_for_initializers", "1") // weights need no room to grow
            // threads of one graph must not spin on the cores that the other needs: it doubles the time
            if (asked.hybrid) options.addConfigEntry("session.force_spinning_stop", "1")
            options.setSessionLogLevel(OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR) // errors arrive as exceptions
            if (asked.given.isNotEmpty()) options.addExternalInitializers(asked.given)
            session = ENVIRONMENT.createSession(file.path, options)
        } catch (error: OrtException) {
            options.close()
            throw ModelException("onnxruntime cannot open ${file.name}: ${error.message}", error)
        }
        val wanted = sizes.cacheNames().map { "past_key_values.$it" } + listOf("input_ids", "attention_mask")
        val differing = (wanted - session.inputNames) + (session.inputNames - wanted.toSet())
        if (differing.isNotEmpty()) {
            close()
            throw ModelException("${file.name}: inputs differ from the manifest in ${differing.take(3)}; take the bundle again")
        }
    }

    /** Appends [count] tokens [ids] `[1, count]` at [position]; [logits] `[1, n, vocab]`, of all of them or the last, where wanted. */
    fun run(ids: OnnxTensor, caches: Caches, position: Int, count: Int, logits: OnnxTensor? = null) {
        caches.mask(position + count).use { mask ->
            session.run(caches.inputs(ids, mask), emptySet(), caches.outputs(logits)).close()
        }
    }

    override fun close() {
        session.close()
        options.close()
    }
}

internal val ENVIRONMENT: OrtEnvironment by lazy { OrtEnvironment.getEnvironment() }

/** int64 `[1, n]`, copied by the runtime. */
internal fun idTensor(ids: IntArray): OnnxTensor = tensor(LongBuffer.wrap(LongArray(ids.size) { ids[it].toLong() }), 1, ids.size)

/** A tensor over a direct buffer's own memory. */
internal fun tensor(data: ByteBuffer, type: OnnxJavaType, vararg shape: Int): OnnxTensor =
    OnnxTensor.createTensor(ENVIRONMENT, data, longs(shape), type)

internal fun tensor(data: FloatBuffer, vararg shape: Int): OnnxTensor = OnnxTensor.createTensor(ENVIRONMENT, data, longs(shape))

internal fun tensor(data: LongBuffer, vararg shape: Int): OnnxTensor = OnnxTensor.createTensor(ENVIRONMENT, data, longs(shape))

private fun longs(shape: IntArray) = LongArray(shape.size) { shape[it].toLong() }
