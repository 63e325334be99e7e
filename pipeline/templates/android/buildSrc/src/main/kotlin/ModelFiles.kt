import java.io.File
import java.nio.file.Files
import java.nio.file.StandardCopyOption
import java.security.MessageDigest
import java.util.Properties

/**
 * What `artifacts.properties` says of the bundle's models, and the files of one of them. The bundle holds each model once: they are
 * linked (or copied, where the file system has no links) from `../onnx` or `../litert` to where Gradle packs assets from.
 */
class ModelFiles(private val bundle: File, artifact: String) {
    private val properties = Properties().apply { bundle.resolve("android/artifacts.properties").inputStream().use { load(it) } }
    private val name = artifact.takeIf { "$it.files" in properties.stringPropertyNames() }
        ?: throw IllegalArgumentException("pocketlm.artifact=$artifact: give one of ${properties.getProperty("artifacts")}")

    /** `onnx` or `litert`: the runtime that the library is built for. */
    val runtime: String = properties.getProperty("$name.runtime")

    /** Why Play would not take the model as a pack, or null. */
    val tooLarge: String? = properties.getProperty("$name.too_large")

    /** Makes `<assets>/model` hold exactly this model's files. Files that are there already are left. */
    fun link(assets: File) {
        val target = assets.resolve("model")
        val paths = properties.getProperty("$name.files").split(',')
        target.walkBottomUp().filter { it.isFile && it.relativeTo(target).invariantSeparatorsPath !in paths }.forEach { it.delete() }
        for (path in paths) {
            val source = bundle.resolve(path)
            val place = target.resolve(path)
            require(source.isFile) { "$path is missing: leave android/ in the bundle's folder, beside onnx/ and litert/" }
            if (place.isFile && place.length() == source.length() && place.lastModified() == source.lastModified()) continue
            place.parentFile.mkdirs()
            Files.deleteIfExists(place.toPath())
            try {
                Files.createLink(place.toPath(), source.toPath())
            } catch (_: Exception) { // UnsupportedOperationException, or an IOException between two file systems
                Files.copy(source.toPath(), place.toPath(), StandardCopyOption.COPY_ATTRIBUTES)
            }
        }
    }

    /** SHA-256 of the bundle's manifest: the app takes no other one. */
    fun manifestSha256(): String =
        MessageDigest.getInstance("SHA-256").digest(bundle.resolve("manifest.json").readBytes()).joinToString("") { "%02x".format(it) }
}
