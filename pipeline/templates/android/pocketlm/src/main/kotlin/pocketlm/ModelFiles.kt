package pocketlm

import java.io.File

/** An int8 matrix of a hybrid's prompt graph, which is made of the decode graph's codes `[outputs, blocks, block]`. */
internal class PromptMatrix(
    val name: String,
    val inputs: Int,
    val outputs: Int,
    val blocks: Int,
    val block: Int,
    val bits: Int,
    val codes: Long,
    val scales: Long,
    val zeros: Long?,
    val rowScale: Long?,
)

/** The second graph of a hybrid ONNX artifact: prompts go through it. */
internal class PromptGraph(val graph: File, val data: File, val matrices: List<PromptMatrix>)

/** The files of an artifact, each checked against the manifest. */
internal class ModelFiles private constructor(val artifact: Artifact, val model: File, val prompt: PromptGraph?) {
    companion object {
        /** Reads the artifact's sidecar and checks every file that it names. */
        fun verified(root: File, manifest: Manifest, artifact: Artifact): ModelFiles {
            val folder = artifact.sidecar.substringBeforeLast('/')
            val sidecar = manifest.verified(root, artifact.sidecar).bufferedReader().use { stream ->
                JsonReader(stream).let { json -> Fields(json.readValue(), artifact.sidecar).also { json.end() } }
            }
            val files = sidecar.list("files").associate { file ->
                val name = Manifest.plain(file.string("path"))
                name to manifest.verified(root, "$folder/$name")
            }
            val model = files.values.find { it == File(root, artifact.file) }
                ?: throw ModelException("${artifact.sidecar}: does not name ${artifact.file}; take the bundle again")
            return ModelFiles(artifact, model, if (sidecar.has("prompt")) promptOf(sidecar.part("prompt"), files) else null)
        }

        private fun promptOf(prompt: Fields, files: Map<String, File>): PromptGraph {
            fun file(name: String) = files[prompt.string(name)]
                ?: throw ModelException("${prompt.string(name)}: not among the artifact's files; take the bundle again")
            return PromptGraph(file("file"), file("data"), prompt.list("weights").map(::matrixOf))
        }

        private fun matrixOf(weight: Fields): PromptMatrix {
            val offsets = weight.part("offsets")
            fun optional(name: String) = if (offsets.has(name)) offsets.long(name) else null
            return PromptMatrix(
                weight.string("name"), weight.int("inputs"), weight.int("outputs"), weight.int("blocks"), weight.int("block"),
                weight.int("bits"), offsets.long("codes"), offsets.long("scales"), optional("zeros"), optional("row_scale"),
            )
        }
    }
}
