package pocketlm

import androidx.test.ext.junit.runners.AndroidJUnit4
import androidx.test.platform.app.InstrumentationRegistry
import java.io.File
import java.io.RandomAccessFile
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import org.junit.Assert.assertEquals
import org.junit.Assert.assertThrows
import org.junit.Assert.assertTrue
import org.junit.Test
import org.junit.runner.RunWith

/** Runs on the device: `./gradlew :pocketlm:connectedAndroidTest`. */
@RunWith(AndroidJUnit4::class)
class GoldenReplayTest {
    private val context = InstrumentationRegistry.getInstrumentation().targetContext
    private val assets = InstrumentationRegistry.getInstrumentation().context.assets
    private val sha256 = InstrumentationRegistry.getArguments().getString("manifestSha256")!!
    private val folder = ModelAssets.install(InstrumentationRegistry.getInstrumentation().context, sha256)

    @Test
    fun goldenVectorsHoldOnThisDevice() {
        val golden = File(context.cacheDir, "golden.npz")
        assets.open("golden.npz").use { from -> golden.outputStream().use { from.copyTo(it) } }
        LanguageModel.open(folder, OpenOptions(manifestSha256 = sha256)).use { model ->
            val result = runBlocking { model.replay(golden) }
            assertTrue(result.failures.joinToString("\n"), result.passed)
        }
    }

    @Test
    fun theSameSeedGivesTheSameText() = LanguageModel.open(folder, OpenOptions(manifestSha256 = sha256)).use { model ->
        val options = GenerateOptions(maxTokens = 16, temperature = 0.8, topK = 40, seed = 7)
        val (once, again) = List(2) { runBlocking { model.generate(intArrayOf(1, 2, 3), options).toList() } }
        assertEquals(once, again)
    }

    @Test
    fun aChangedFileIsRefused() {
        val changed = File(context.cacheDir, "changed").also { it.deleteRecursively() }
        folder.copyRecursively(changed)
        val manifest = Manifest.read(changed, sha256)
        val file = File(changed, manifest.artifact(changed, null).file)
        RandomAccessFile(file, "rw").use { bytes ->
            val middle = file.length() / 2
            val byte = bytes.apply { seek(middle) }.read()
            bytes.apply { seek(middle) }.write(byte.inv())
        }
        val refused = assertThrows(ModelException::class.java) { LanguageModel.open(changed, OpenOptions(manifestSha256 = sha256)) }
        assertTrue(refused.message!!, refused.message!!.contains(file.name))
        changed.deleteRecursively()
    }
}
