package pocketlm

import ai.onnxruntime.OrtException

/** Opens an ONNX artifact: one graph, or the two of a hybrid. */
internal fun openSession(files: ModelFiles, options: OpenOptions): Session {
    if (files.artifact.format != "onnx") {
        throw ModelException("${files.artifact.file}: this library was built for ONNX Runtime; set pocketlm.artifact in gradle.properties")
    }
    val prompt = files.prompt?.let { PromptSession.open(it, files.artifact, options) }
    return OnnxSession(files, options, prompt)
}

/**
 * ONNX Runtime: past and present of every layer are one buffer of the whole context, which the graph's GroupQueryAttention appends to
 * in place; the real length comes from the attention mask. So a step copies neither the cache nor, but to sample, the logits.
 */
internal class OnnxSession(files: ModelFiles, options: OpenOptions, private val prompt: PromptSession?) : Session {
    override val sizes: Interface = files.artifact.sizes
    override var position = 0
        private set

    private val name = files.artifact.name
    private val buffers = options.buffers
    private val graph = Graph(files.model, sizes, GraphOptions(options.threads, hybrid = prompt != null))
    private val caches = Caches(files.artifact, buffers)
    private val logits = FloatArray(sizes.vocabSize)
    private val stepLogits = buffers.allocate(Float.SIZE_BYTES * sizes.vocabSize)
    private val stepLogitsTensor = tensor(stepLogits.asFloatBuffer(), 1, 1, sizes.vocabSize)
    private val token = buffers.allocate(Long.SIZE_BYTES)
    private val tokenTensor = tensor(token.asLongBuffer(), 1, 1)
    private val chunk = minOf(CHUNK_TOKENS, maxOf(1, PROMPT_LOGITS_BYTES / (Float.SIZE_BYTES * sizes.vocabSize)))

    override fun prefill(ids: IntArray, pause: () -> Unit): FloatArray {
        check(ids)
        if (prompt == null) {
            inChunks(ids, chunk, pause) { part -> withLogits(part) }
            return logits
        }
        // however few they are: what a prompt gives does not depend on how much of it was fed before
        inChunks(ids, CHUNK_TOKENS, pause) { part ->
            idTensor(part).use { run { prompt.run(it, caches, position, part.size, stepLogitsTensor) } }
            position += part.size
        }
        return readStepLogits()
    }

    override fun step(id: Int): FloatArray {
        check(intArrayOf(id))
        token.putLong(0, id.toLong())
        run { graph.run(tokenTensor, caches, position, 1, stepLogitsTensor) }
        position++
        return readStepLogits()
    }

    override fun rewind(position: Int) {
        this.position = position // what lies beyond the mask is never read
    }

    override fun close() {
        graph.close()
        prompt?.close()
        caches.close()
        stepLogitsTensor.close()
        tokenTensor.close()
        buffers.free(stepLogits)
        buffers.free(token)
    }

    private fun readStepLogits(): FloatArray = logits.also { stepLogits.asFloatBuffer().get(it) }

    /** Appends [part] and keeps the logits of its last token. */
    private fun withLogits(part: IntArray) {
        val all = buffers.allocate(Float.SIZE_BYTES * part.size * sizes.vocabSize)
        try {
            tensor(all.asFloatBuffer(), 1, part.size, sizes.vocabSize).use { answer ->
                idTensor(part).use { run { graph.run(it, caches, position, part.size, answer) } }
            }
            position += part.size
            all.asFloatBuffer().also { it.seek((part.size - 1) * sizes.vocabSize) }.get(logits)
        } finally {
            buffers.free(all)
        }
    }

    private fun run(work: () -> Unit) = try {
        work()
    } catch (error: OrtException) {
        throw ModelException("onnxruntime could not run $name at token $position: ${error.message}", error)
    }

    private companion object {
        const val CHUNK_TOKENS = 128 // of a prompt in one call: memory stays bounded, and larger chunks were no faster
        const val PROMPT_LOGITS_BYTES = 32 shl 20 // where the graph gives logits of every prompt token: fewer of a large vocabulary
    }
}

/** Calls [work] with [ids] in chunks, and [pause] between them. */
private inline fun inChunks(ids: IntArray, chunk: Int, pause: () -> Unit, work: (IntArray) -> Unit) {
    for (start in ids.indices step chunk) {
        if (start > 0) pause()
        work(ids.copyOfRange(start, minOf(start + chunk, ids.size)))
    }
}
