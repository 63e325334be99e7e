package pocketlm

import java.io.Closeable
import java.io.File
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.channels.Channel
import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.buffer
import kotlinx.coroutines.flow.flow
import kotlinx.coroutines.flow.flowOn
import kotlinx.coroutines.sync.Mutex
import kotlinx.coroutines.sync.withLock
import kotlinx.coroutines.withContext

/**
 * How a model is opened. [artifact] is needed only where the folder holds several models. [manifestSha256] binds the folder to the
 * build of your app: only a manifest with that hash is taken. [buffers] is where the cache's memory comes from.
 */
data class OpenOptions(
    val threads: Int = 4,
    val artifact: String? = null,
    val manifestSha256: String? = null,
    val buffers: NativeBuffers = platformBuffers,
)

/**
 * A language model in a folder of this device, laid out as in the bundle: `manifest.json`, `tokenizer/`, and `onnx/` or `litert/`.
 *
 * ```
 * LanguageModel.open(folder).use { model ->
 *     model.generate("def fibonacci(", GenerateOptions(temperature = 0.8, topK = 40)).collect { print(it.text) }
 * }
 * ```
 * The model is opened from its path: the runtime maps or reads the file itself, and no byte of it passes through the JVM's heap.
 */
class LanguageModel private constructor(
    val manifest: Manifest,
    val artifact: Artifact,
    private val tokenizer: Tokenizer?,
    private val session: Session,
) : Closeable {
    private val one = Mutex() // there is one cache
    private val lock = Any()
    private var current: Generation? = null
    private var closed = false

    /** What the last text cost, or the one in the making so far. */
    @Volatile
    var statistics: RunStatistics? = null
        private set

    /** Ids of [text]. ModelException where this bundle's tokenizer has no rules for the device (the bundle's README says why). */
    fun encode(text: String): IntArray = known().encode(text)

    fun decode(ids: IntArray): String = known().decode(ids)

    /**
     * Tokens of the continuation of [prompt], made while they are collected, off the main thread. Cancelling the collector ends it at
     * the next token, or within a long prompt at the next chunk. A second text waits until the first one is done.
     */
    fun generate(prompt: String, options: GenerateOptions = GenerateOptions()): Flow<Token> =
        tokens(options) { promptIds(known(), prompt, artifact.sizes) }

    /** The same for ids. Where there is no tokenizer, the tokens come without text. */
    fun generate(prompt: IntArray, options: GenerateOptions = GenerateOptions()): Flow<Token> = tokens(options) { prompt }

    /** Ends the text in the making, from any thread: its Flow completes after the token that is being computed. */
    fun cancel() {
        synchronized(lock) { current?.cancel() }
    }

    /** Replays golden vectors through this model on this device, once a text in the making is done: see [GoldenReplay]. */
    suspend fun replay(golden: File): ReplayResult = one.withLock {
        withContext(Dispatchers.Default) { computing { GoldenReplay(session, artifact.gates).run(golden) } }
    }

    override fun close() = synchronized(this) {
        if (!closed) session.close()
        closed = true
    }

    private fun tokens(options: GenerateOptions, prompt: () -> IntArray): Flow<Token> = flow {
        one.withLock {
            val context = currentCoroutineContext()
            val generation = computing { Generation(session, tokenizer, prompt(), options) }
            synchronized(lock) { current = generation }
            try {
                while (true) {
                    context.ensureActive()
                    val token = computing { generation.next { context.ensureActive() } } ?: break
                    statistics = generation.statistics()
                    emit(token)
                }
            } finally {
                synchronized(lock) { current = null }
                statistics = generation.statistics()
            }
        }
    }.flowOn(Dispatchers.Default).buffer(Channel.RENDEZVOUS) // else the model would run 64 tokens ahead of who reads them

    /** Closing waits for the token that is being computed: the native session must not go away under it. */
    private fun <T> computing(work: () -> T): T = synchronized(this) {
        check(!closed) { "the model is closed" }
        work()
    }

    private fun known(): Tokenizer = tokenizer
        ?: throw ModelException("${TextRules.FILE} is not in this bundle: its tokenizer is of another kind; use generate(ids)")

    companion object {
        /** Checks SHA-256 of every file that is used, then opens them. ModelException, in one line, where a file is not the proved one. */
        fun open(folder: File, options: OpenOptions = OpenOptions()): LanguageModel {
            val manifest = Manifest.read(folder, options.manifestSha256)
            val artifact = manifest.artifact(folder, options.artifact)
            val tokenizer = if (TextRules.FILE in manifest.files) {
                Tokenizer.read(manifest.verified(folder, manifest.tokenizer), manifest.verified(folder, TextRules.FILE))
            } else {
                null
            }
            return LanguageModel(manifest, artifact, tokenizer, openSession(ModelFiles.verified(folder, manifest, artifact), options))
        }
    }
}
