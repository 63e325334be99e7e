package pocketlm

import android.content.Context
import android.content.res.AssetManager
import java.io.File
import java.io.FileNotFoundException
import java.io.IOException

/**
 * Puts the model that travels in the app's assets, or in its install-time model pack, into the app's private storage, and returns the
 * folder for [LanguageModel.open]. A second call finds everything there. The files are copied in blocks: a runtime needs a path.
 *
 * A fast-follow or on-demand pack lies in a folder already: open `File(AiPackLocation.assetsPath(), "model")` instead, without a copy.
 */
object ModelAssets {
    private const val BLOCK_BYTES = 1 shl 18

    /** Blocking: call it off the main thread. [manifestSha256] as in [OpenOptions]. ModelException where there is no room or no model. */
    fun install(context: Context, manifestSha256: String, folder: String = "model"): File {
        val models = File(context.noBackupFilesDir, "pocketlm")
        val target = File(models, manifestSha256.take(16))
        copy(context.assets, "$folder/${Manifest.FILE}", File(target, Manifest.FILE))
        val proved = Manifest.read(target, manifestSha256).files
        for (name in filesIn(context.assets, folder)) {
            val file = File(target, name)
            if (name in proved && file.length() != proved.getValue(name).bytes) copy(context.assets, "$folder/$name", file)
        }
        models.listFiles()?.filter { it != target }?.forEach { it.deleteRecursively() } // models of earlier versions of the app
        return target
    }

    private fun filesIn(assets: AssetManager, folder: String): List<String> = assets.list(folder).orEmpty().flatMap { name ->
        val below = assets.list("$folder/$name").orEmpty()
        if (below.isEmpty()) listOf(name) else filesIn(assets, "$folder/$name").map { "$name/$it" }
    }

    /** A file is there whole or not at all; whether it is the proved one is checked when it is opened. */
    private fun copy(assets: AssetManager, asset: String, target: File) {
        val draft = File(target.path + ".draft")
        try {
            target.parentFile?.mkdirs()
            assets.open(asset, AssetManager.ACCESS_STREAMING).use { from -> draft.outputStream().use { from.copyTo(it, BLOCK_BYTES) } }
        } catch (error: FileNotFoundException) {
            throw ModelException("$asset is not in this app; build it with its model pack, or a debug build", error)
        } catch (error: IOException) {
            draft.delete()
            throw ModelException("${target.name} cannot be put into the app's storage (${error.message}); make room and start again", error)
        }
        if (!draft.renameTo(target)) throw ModelException("${target.name} cannot be renamed into its place; start again")
    }
}
