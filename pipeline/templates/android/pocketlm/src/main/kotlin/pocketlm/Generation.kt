package pocketlm

/**
 * How text is made. [temperature] 0 takes the most likely token; [topK] 0 and [topP] 1 cut nothing off. [stop] texts end it and are
 * not shown, [stopIds] end it beside the model's own end of text. The same [seed] gives the same text.
 */
data class GenerateOptions(
    val maxTokens: Int = 128,
    val temperature: Double = 0.0,
    val topK: Int = 0,
    val topP: Double = 1.0,
    val seed: Long = 0,
    val stop: List<String> = emptyList(),
    val stopIds: Set<Int> = emptySet(),
) {
    init {
        require(maxTokens >= 1) { "maxTokens $maxTokens: give 1 or more" }
        require(stop.none { it.isEmpty() }) { "stop: an empty text would stop nothing" }
    }

    val sampling: Sampling = Sampling(temperature, topK, topP)
}

/** One token and the [text] that became certain with it, which may be empty. [id] null: text that was held back to the end. */
data class Token(val id: Int?, val text: String)

/** Why a text ended. */
enum class Ended { END_OF_TEXT, STOP, MAX_TOKENS, CONTEXT_FULL, CANCELLED }

/** What a run cost. Times are null where nothing was timed: no token, or but one. */
data class RunStatistics(
    val promptTokens: Int,
    val newTokens: Int,
    val firstTokenMs: Double?,
    val tokensPerSecond: Double?,
    val ended: Ended?,
)

/** One text in the making: [next] gives token after token, then null. [tokenizer] null: ids without text. */
class Generation(
    private val session: Session,
    private val tokenizer: Tokenizer?,
    private val prompt: IntArray,
    private val options: GenerateOptions,
) {
    private val random = Pcg64(options.seed)
    private val characters = Utf8Stream()
    private val stops = StopText(options.stop)
    private val started = System.nanoTime()
    private var first = 0L
    private var last = 0L
    private var newTokens = 0
    private var token = NONE
    private var ended: Ended? = null
    private var flushed = false

    @Volatile
    private var cancelled = false

    init {
        if (prompt.size >= session.sizes.contextTokens) {
            val held = session.sizes.contextTokens
            throw ModelException("the prompt has ${prompt.size} tokens but the context holds $held; give a shorter one")
        }
        session.rewind(0)
    }

    /** The next token, or null at the end. [pause] is called between chunks of the prompt and may throw to end it. */
    fun next(pause: () -> Unit = {}): Token? {
        if (cancelled && ended == null) ended = Ended.CANCELLED
        if (ended != null) return rest()
        val logits = try {
            if (token == NONE) session.prefill(prompt) { pause(); if (cancelled) throw Cancelled() } else session.step(token)
        } catch (_: Cancelled) {
            ended = Ended.CANCELLED
            return rest()
        }
        token = nextToken(logits, options.sampling, random::nextDouble)
        last = System.nanoTime()
        if (first == 0L) first = last
        if (token == session.sizes.eosTokenId || token in options.stopIds) {
            ended = Ended.END_OF_TEXT
            return rest()
        }
        newTokens++
        val text = stops.push(tokenizer?.let { characters.push(it.bytesOf(token)) } ?: "")
        ended = when {
            stops.stopped -> Ended.STOP
            prompt.size + newTokens > session.sizes.contextTokens -> Ended.CONTEXT_FULL
            newTokens == options.maxTokens -> Ended.MAX_TOKENS
            else -> null
        }
        return Token(token, text)
    }

    /** Ends it: [next] gives what was held back and then null. */
    fun cancel() {
        cancelled = true
    }

    fun statistics(): RunStatistics {
        val decoding = (last - first) / 1e9
        val speed = if (newTokens > 1 && decoding > 0) (newTokens - 1) / decoding else null
        return RunStatistics(prompt.size, newTokens, if (first == 0L) null else (first - started) / 1e6, speed, ended)
    }

    private fun rest(): Token? {
        if (flushed) return null
        flushed = true
        val text = stops.push(characters.finish()) + stops.finish()
        return if (text.isEmpty()) null else Token(null, text)
    }

    /** Leaves a long prompt between two chunks. */
    private class Cancelled : RuntimeException()

    private companion object {
        const val NONE = -1
    }
}

/** The ids of a prompt; an empty one is the model's first token. */
internal fun promptIds(tokenizer: Tokenizer, prompt: String, sizes: Interface): IntArray {
    val ids = tokenizer.encode(prompt)
    if (ids.isNotEmpty()) return ids
    val start = sizes.bosTokenId ?: sizes.eosTokenId
        ?: throw ModelException("the prompt is empty and this model has no token that begins a text")
    return intArrayOf(start)
}
