package pocketlm

import java.io.ByteArrayInputStream
import java.io.File
import java.io.IOException
import java.security.MessageDigest

/** The sizes that the host loop needs, as the manifest has them. */
data class Interface(
    val vocabSize: Int,
    val layers: Int,
    val kvHeads: Int,
    val headDim: Int,
    val contextTokens: Int,
    val bosTokenId: Int?,
    val eosTokenId: Int?,
) {
    /** Numbers in one key or value buffer `[1, kvHeads, contextTokens, headDim]`. */
    val cacheNumbers: Int get() = kvHeads * contextTokens * headDim
}

/** Limits that golden vectors are held against; null is not judged. */
data class Gates(val top1: Double?, val kl: Double?, val maxAbsDiff: Double?)

/**
 * One exported model. [prefills] are a TFLite file's prompt signatures with their tokens, the shortest first; [cacheType] is the
 * element type of an ONNX model's keys and values.
 */
data class Artifact(
    val name: String,
    val format: String,
    val file: String,
    val sidecar: String,
    val sizes: Interface,
    val prefills: List<Prefill>,
    val cacheType: String,
    val gates: Gates,
)

/** A prompt signature of a TFLite file, for chunks of [tokens]. */
data class Prefill(val signature: String, val tokens: Int)

/** A file that was proved: what it must be to the byte. */
data class ProvedFile(val path: String, val sha256: String, val bytes: Long)

/** `manifest.json` of a bundle, and the check that a file on this device is the one that was proved. */
class Manifest private constructor(
    val name: String,
    val artifacts: List<Artifact>,
    val tokenizer: String,
    val files: Map<String, ProvedFile>,
) {

    /**
     * The file [path] below [root], after its length and SHA-256 were compared with the manifest.
     *
     * Throws ModelException, which names the file, where it is missing, longer, shorter or changed, or not in the manifest at all.
     */
    fun verified(root: File, path: String): File {
        val proved = files[path] ?: throw ModelException("$path: not in manifest.json; take the bundle again")
        val file = File(root, path)
        if (!file.isFile) throw ModelException("$path: missing in $root; copy it there")
        val size = file.length()
        if (size != proved.bytes) throw ModelException("$path: $size bytes, the manifest says ${proved.bytes}; copy it again")
        val found = sha256Of(file)
        if (found != proved.sha256) {
            throw ModelException("$path: changed (SHA-256 $found, the manifest says ${proved.sha256}); copy it again")
        }
        return file
    }

    /** The artifact called [name]; without a name the one whose model file lies below [root]. */
    fun artifact(root: File, name: String?): Artifact {
        if (name != null) {
            return artifacts.find { it.name == name }
                ?: throw ModelException("no artifact $name; there are ${artifacts.joinToString { it.name }}")
        }
        val present = artifacts.filter { File(root, it.file).isFile }
        if (present.size == 1) return present[0]
        val found = if (present.isEmpty()) "no model file" else "several models (${present.joinToString { it.name }})"
        throw ModelException("$found in $root; name one of ${artifacts.joinToString { it.name }}")
    }

    companion object {
        const val FILE = "manifest.json"

        /** Reads the manifest in [root]; where [sha256] is given, only that very manifest is taken. */
        fun read(root: File, sha256: String? = null): Manifest {
            val bytes = try {
                File(root, FILE).readBytes()
            } catch (error: IOException) {
                throw ModelException("$FILE: cannot be read in $root (${error.message}); copy the bundle's files there", error)
            }
            val found = hex(MessageDigest.getInstance("SHA-256").digest(bytes))
            if (sha256 != null && found != sha256) throw ModelException("$FILE: SHA-256 $found, this app was built with $sha256")
            return parse(bytes)
        }

        internal fun parse(bytes: ByteArray): Manifest {
            val json = JsonReader(ByteArrayInputStream(bytes).reader(Charsets.UTF_8))
            val fields = Fields(json.readValue(), FILE).also { json.end() }
            val files = fields.list("files").map { ProvedFile(plain(it.string("path")), it.string("sha256"), it.long("bytes")) }
            val tokenizer = plain(fields.part("tokenizer").string("file"))
            return Manifest(fields.string("name"), fields.list("artifacts").map(::artifactOf), tokenizer, files.associateBy { it.path })
        }

        private fun artifactOf(fields: Fields): Artifact {
            val sizes = fields.part("interface")
            val gates = fields.part("gates")
            val format = fields.string("format")
            return Artifact(
                name = fields.string("name"),
                format = format,
                file = plain(fields.string("file")),
                sidecar = plain(fields.string("sidecar")),
                sizes = Interface(
                    sizes.int("vocab_size"), sizes.int("layers"), sizes.int("kv_heads"), sizes.int("head_dim"),
                    sizes.int("context_tokens"), sizes.intOrNull("bos_token_id"), sizes.intOrNull("eos_token_id"),
                ),
                prefills = if (format == "tflite") prefillsOf(fields.part("tensors")) else emptyList(),
                cacheType = if (format == "onnx") cacheTypeOf(fields.part("tensors")) else "float32",
                gates = Gates(gates.doubleOrNull("top1"), gates.doubleOrNull("kl"), gates.doubleOrNull("max_abs_diff")),
            )
        }

        /** Every signature but `decode`, by the width of its `tokens` `[1, n]`. */
        private fun prefillsOf(tensors: Fields): List<Prefill> = (tensors.names - "decode").map { signature ->
            val tokens = tensors.part(signature).list("inputs").find { it.string("name") == "tokens" }
                ?: throw ModelException("$FILE: signature $signature has no input tokens; take the bundle again")
            Prefill(signature, tokens.ints("shape").last())
        }.sortedBy { it.tokens }

        private fun cacheTypeOf(tensors: Fields): String {
            val past = tensors.list("inputs").filter { it.string("name").startsWith("past_key_values.") }
            val types = past.map { it.string("dtype") }.toSet()
            return types.singleOrNull() ?: throw ModelException("$FILE: a KV cache of types $types; take the bundle again")
        }

        /** Only plain relative paths: anything else could leave the folder. */
        internal fun plain(path: String): String {
            val parts = path.split('/')
            if (path.isEmpty() || '\\' in path || ':' in path || parts.any { it.isEmpty() || it == "." || it == ".." }) {
                throw ModelException("$FILE: $path is no plain path; take the bundle again")
            }
            return path
        }
    }
}

/** Hexadecimal SHA-256 of a file, read in blocks. */
fun sha256Of(file: File): String {
    val digest = MessageDigest.getInstance("SHA-256")
    val block = ByteArray(1 shl 18)
    file.inputStream().use { stream ->
        while (true) {
            val count = stream.read(block)
            if (count < 0) break
            digest.update(block, 0, count)
        }
    }
    return hex(digest.digest())
}

internal fun hex(bytes: ByteArray): String = bytes.joinToString("") { "%02x".format(it) }

/** The members of a JSON object of the file [origin]; a missing one, or one of another type, is a ModelException that names it. */
internal class Fields(value: Any?, private val origin: String) {
    private val members = value as? Map<*, *> ?: throw ModelException("$origin: a JSON object is expected; take the bundle again")

    val names: Set<String> get() = members.keys.mapTo(LinkedHashSet()) { it as String }

    fun has(name: String): Boolean = members[name] != null

    fun string(name: String): String = members[name] as? String ?: throw wrong(name, "a text")

    fun long(name: String): Long = members[name] as? Long ?: throw wrong(name, "a whole number")

    fun int(name: String): Int = intOrNull(name) ?: throw wrong(name, "a whole number")

    fun intOrNull(name: String): Int? = if (has(name)) long(name).toInt() else null

    fun doubleOrNull(name: String): Double? =
        if (has(name)) (members[name] as? Number ?: throw wrong(name, "a number")).toDouble() else null

    fun flag(name: String): Boolean = members[name] as? Boolean ?: throw wrong(name, "true or false")

    fun part(name: String): Fields = Fields(members[name], "$origin, $name")

    fun list(name: String): List<Fields> =
        (members[name] as? List<*> ?: throw wrong(name, "a list")).map { Fields(it, "$origin, $name") }

    fun ints(name: String): List<Int> =
        (members[name] as? List<*> ?: throw wrong(name, "a list")).map { (it as? Long ?: throw wrong(name, "whole numbers")).toInt() }

    private fun wrong(name: String, kind: String) = ModelException("$origin: $name must be $kind; take the bundle again")
}
