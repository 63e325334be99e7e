package pocketlm

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import java.nio.ByteBuffer

/** The prompt graph of a hybrid. Its matrices are made when it is opened, and kept only where the session goes on reading them. */
internal class PromptSession private constructor(
    private val graph: Graph,
    private val kept: List<Pair<ByteBuffer, OnnxTensor>>,
    private val buffers: NativeBuffers,
) : AutoCloseable {

    /** Appends [count] tokens; [logits] `[1, 1, vocab]` after the last of them. */
    fun run(ids: OnnxTensor, caches: Caches, position: Int, count: Int, logits: OnnxTensor) =
        graph.run(ids, caches, position, count, logits)

    override fun close() {
        graph.close()
        release(kept, buffers)
    }

    companion object {
        private const val PROBE_TOKENS = 4

        fun open(prompt: PromptGraph, artifact: Artifact, options: OpenOptions): PromptSession =
            PromptMatrices(prompt.data).use { matrices -> open(prompt, matrices, artifact, options) }

        private fun open(prompt: PromptGraph, matrices: PromptMatrices, artifact: Artifact, options: OpenOptions): PromptSession {
            val buffers = options.buffers
            val given = prompt.matrices.map { matrix ->
                val buffer = buffers.allocate(matrix.inputs * matrix.outputs)
                matrices.write(matrix, buffer)
                buffer to tensor(buffer, OnnxJavaType.INT8, matrix.inputs, matrix.outputs)
            }
            val graph = try {
                val byName = prompt.matrices.map { it.name }.zip(given.map { it.second }).toMap()
                Graph(prompt.graph, artifact.sizes, GraphOptions(options.threads, hybrid = true, given = byName))
            } catch (error: ModelException) {
                release(given, buffers)
                throw error
            }
            if (readsItsOwn(graph, given.map { it.first }, artifact, buffers)) {
                release(given, buffers)
                return PromptSession(graph, emptyList(), buffers)
            }
            prompt.matrices.zip(given).forEach { (matrix, pair) -> matrices.write(matrix, pair.first) }
            return PromptSession(graph, given, buffers)
        }

        /**
         * Whether the session has packed the matrices into memory of its own: then it does not see that they are zero from here on. It
         * says nothing of that itself, and where a processor has no packed kernel it goes on reading ours.
         */
        private fun readsItsOwn(graph: Graph, matrices: List<ByteBuffer>, artifact: Artifact, buffers: NativeBuffers) =
            Caches(artifact, buffers).use { caches ->
                val before = probe(graph, caches, artifact.sizes)
                val zeros = ByteArray(1 shl 16)
                for (matrix in matrices) {
                    matrix.seek(0)
                    while (matrix.hasRemaining()) matrix.put(zeros, 0, minOf(zeros.size, matrix.remaining()))
                    matrix.seek(0)
                }
                before.contentEquals(probe(graph, caches, artifact.sizes))
            }

        /** Keys and values of a few tokens. */
        private fun probe(graph: Graph, caches: Caches, sizes: Interface): ByteArray {
            idTensor(IntArray(PROBE_TOKENS) { it % sizes.vocabSize }).use { graph.run(it, caches, 0, PROBE_TOKENS) }
            return caches.first(PROBE_TOKENS)
        }

        private fun release(given: List<Pair<ByteBuffer, OnnxTensor>>, buffers: NativeBuffers) = given.forEach { (buffer, tensor) ->
            tensor.close()
            buffers.free(buffer)
        }
    }
}
