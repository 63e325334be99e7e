package pocketlm.sample

import android.app.Activity
import android.os.Bundle
import android.view.View
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView
import java.io.File
import java.io.IOException
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.Job
import kotlinx.coroutines.SupervisorJob
import kotlinx.coroutines.cancel
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext
import pocketlm.GenerateOptions
import pocketlm.LanguageModel
import pocketlm.ModelAssets
import pocketlm.OpenOptions

/** One screen: a prompt, its continuation as it comes, what it cost, and the golden vectors replayed on this device. */
class MainActivity : Activity() {
    private val scope = CoroutineScope(SupervisorJob() + Dispatchers.Main)
    private var model: LanguageModel? = null
    private var running: Job? = null

    private lateinit var prompt: EditText
    private lateinit var answer: TextView
    private lateinit var status: TextView
    private lateinit var buttons: List<Button>

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        setContentView(screen())
        show(getString(R.string.opening))
        scope.launch { open() }
    }

    override fun onDestroy() {
        scope.cancel()
        val opened = model
        Thread { opened?.close() }.start() // waits for the token that is being computed, so not on this thread
        super.onDestroy()
    }

    private suspend fun open() = telling {
        val started = System.nanoTime()
        val opened = withContext(Dispatchers.IO) {
            val folder = ModelAssets.install(applicationContext, BuildConfig.MANIFEST_SHA256)
            LanguageModel.open(folder, OpenOptions(manifestSha256 = BuildConfig.MANIFEST_SHA256))
        }
        model = opened
        buttons.forEach { it.isEnabled = true }
        show(getString(R.string.ready, opened.artifact.name, (System.nanoTime() - started) / 1_000_000))
    }

    private fun generate(model: LanguageModel) = start {
        answer.text = prompt.text
        val options = GenerateOptions(maxTokens = 256, temperature = 0.8, topK = 40, topP = 0.95)
        model.generate(prompt.text.toString(), options).collect { token -> answer.append(token.text) }
        val cost = model.statistics ?: return@start
        show(getString(R.string.measured, cost.newTokens, cost.firstTokenMs ?: 0.0, cost.tokensPerSecond ?: 0.0, cost.ended))
    }

    private fun check(model: LanguageModel) = start {
        val golden = File(cacheDir, "golden.npz")
        withContext(Dispatchers.IO) { assets.open("golden.npz").use { from -> golden.outputStream().use { from.copyTo(it) } } }
        val result = model.replay(golden)
        show(
            if (result.passed) getString(R.string.passed, result.maxAbsDiff, 100 * result.top1, result.tokens)
            else getString(R.string.failed, result.failures.joinToString()),
        )
    }

    /** One thing at a time: a new one ends the one before. */
    private fun start(work: suspend () -> Unit) {
        val former = running
        running = scope.launch {
            former?.cancel()
            former?.join()
            telling(work)
        }
    }

    private suspend fun telling(work: suspend () -> Unit) = try {
        work()
    } catch (error: IOException) { // every ModelException is one
        show(error.message ?: error.toString())
    }

    private fun show(text: String) {
        status.text = text
    }

    private fun screen(): View {
        prompt = EditText(this).apply { setHint(R.string.prompt) }
        answer = TextView(this)
        status = TextView(this)
        val generate = button(R.string.generate) { model?.let(::generate) }
        val check = button(R.string.check) { model?.let(::check) }
        val stop = button(R.string.stop) { model?.cancel() }
        buttons = listOf(generate, check, stop)
        val column = LinearLayout(this).apply { orientation = LinearLayout.VERTICAL }
        (listOf(prompt) + buttons + listOf(status, answer)).forEach(column::addView)
        return ScrollView(this).apply {
            fitsSystemWindows = true
            addView(column)
        }
    }

    private fun button(label: Int, click: () -> Unit) = Button(this).apply {
        setText(label)
        isEnabled = false
        setOnClickListener { click() }
    }
}
