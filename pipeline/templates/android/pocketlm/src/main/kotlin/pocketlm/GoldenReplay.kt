package pocketlm

import java.io.File
import kotlin.math.abs
import kotlin.math.exp
import kotlin.math.ln
import kotlin.math.sqrt

/**
 * How far a model on this device is from the fp32 PyTorch model, on the golden vectors. [kl] in nats per token, [top1] a share,
 * [worst] where [maxAbsDiff] was. [greedyPrefix]: tokens of greedy text before the first other one, where they are fewest.
 * [failures]: one line for each gate that was missed.
 */
data class ReplayResult(
    val maxAbsDiff: Double,
    val worst: String,
    val kl: Double,
    val klStderr: Double,
    val top1: Double,
    val tokens: Int,
    val greedyPrefix: Int,
    val greedyTokens: Int,
    val failures: List<String>,
) {
    val passed: Boolean get() = failures.isEmpty()
}

/**
 * Replays `golden/golden.npz` as an app would use the model: the prompt by prefill, then token by token with the cache. The
 * counterpart of `device_tests/replay.py` and `gates.py`, with the same numbers and the same verdict.
 */
class GoldenReplay(private val session: Session, private val gates: Gates) {
    private var maxAbsDiff = 0.0
    private var worst = ""
    private val divergences = ArrayList<DoubleArray>() // [windows][scored]
    private var agreeing = 0
    private var tokens = 0

    /** ModelException where the file is no golden vectors of this model, or its logits are broken: NaN, zero, constant. */
    fun run(golden: File): ReplayResult = Npz(golden).use { npz ->
        npz.array("logits").use { logits -> npz.array("windows").use { windows -> replay(npz, windows, logits) } }
        val (prefix, greedyTokens) = greedy(npz)
        val (kl, klStderr) = estimate()
        val top1 = agreeing.toDouble() / tokens
        ReplayResult(maxAbsDiff, worst, kl, klStderr, top1, tokens, prefix, greedyTokens, judge(kl, klStderr, top1))
    }

    private fun replay(npz: Npz, windows: NpyStream, logits: NpyStream) {
        val promptTokens = npz.array("prompt_tokens").use { it.ints(1)[0] }
        val (count, scored, vocabulary) = logits.shape.also { if (it.size != 3) throw foreign("its logits have the shape $it") }
        if (vocabulary != session.sizes.vocabSize) throw foreign("it has $vocabulary logits, the model ${session.sizes.vocabSize}")
        for (window in 0 until count) {
            val text = windows.ints(windows.shape[1])
            session.rewind(0)
            val divergence = DoubleArray(scored)
            var moved = scored == 1
            var first: FloatArray? = null
            for (row in 0 until scored) {
                val answer = if (row == 0) session.prefill(text.copyOf(promptTokens)) else session.step(text[promptTokens + row - 1])
                val place = "window $window token ${promptTokens - 1 + row}"
                refuseBroken(answer, place)
                if (first == null) first = answer.copyOf() else moved = moved || !first.contentEquals(answer)
                divergence[row] = compare(logits.floats(vocabulary), answer, place)
            }
            if (!moved) throw ModelException("the same logits for every token of window $window: constant logits")
            divergences.add(divergence)
        }
    }

    /** KL(reference || answer) in nats. */
    private fun compare(reference: FloatArray, answer: FloatArray, place: String): Double {
        val (expected, found) = logSoftmax(reference) to logSoftmax(answer)
        var divergence = 0.0
        for (id in reference.indices) {
            val difference = abs(answer[id] - reference[id]).toDouble()
            if (difference > maxAbsDiff || worst.isEmpty()) {
                maxAbsDiff = difference
                worst = place
            }
            divergence += exp(expected[id]) * (expected[id] - found[id])
        }
        if (argmax(reference) == argmax(answer)) agreeing++
        tokens++
        return divergence
    }

    /** The shortest prefix of greedy text that is equal to the reference's, and how long it could be. */
    private fun greedy(npz: Npz): Pair<Int, Int> = npz.array("greedy_prompts").use { prompts ->
        npz.array("greedy_tokens").use { answers ->
            val (count, length) = answers.shape
            val shortest = (0 until count).minOf { equalPrefix(prompts.ints(prompts.shape[1]), answers.ints(length)) }
            shortest to length
        }
    }

    private fun equalPrefix(prompt: IntArray, expected: IntArray): Int {
        session.rewind(0)
        var logits = session.prefill(prompt)
        for ((place, token) in expected.withIndex()) {
            if (argmax(logits) != token) return place
            if (place + 1 < expected.size) logits = session.step(token)
        }
        return expected.size
    }

    /** Mean over all tokens, and its standard error with windows as clusters (tokens, where there is one window). */
    private fun estimate(): Pair<Double, Double> {
        val mean = divergences.sumOf { it.sum() } / tokens
        val clusters = if (divergences.size > 1) divergences.map { it.sum() } else divergences[0].toList()
        val count = clusters.size
        if (count < 2) return mean to Double.NaN
        val squares = clusters.sumOf { (it - mean * tokens / count).let { residual -> residual * residual } }
        return mean to sqrt(count.toDouble() / (count - 1) * squares) / tokens
    }

    /** Some dozens of tokens: top-1 and KL fail where they miss their limit by more than three standard errors. */
    private fun judge(kl: Double, klStderr: Double, top1: Double): List<String> {
        val failures = ArrayList<String>()
        gates.maxAbsDiff?.let { if (!(maxAbsDiff <= it)) failures.add("max_abs_diff $maxAbsDiff exceeds $it (worst: $worst)") }
        gates.top1?.let {
            val lowest = it - ALLOWED_ERRORS * sqrt(it * (1 - it) / tokens)
            if (!(top1 >= lowest)) failures.add("top1 $top1 is below $lowest, for $tokens tokens and a limit of $it (worst: $worst)")
        }
        gates.kl?.let {
            val highest = it + if (klStderr.isNaN()) 0.0 else ALLOWED_ERRORS * klStderr
            if (!(kl <= highest)) failures.add("kl $kl exceeds $highest, for $tokens tokens and a limit of $it (worst: $worst)")
        }
        return failures
    }

    private fun refuseBroken(logits: FloatArray, place: String) {
        var low = logits[0]
        var high = logits[0]
        var finite = true
        for (value in logits) {
            finite = finite && !value.isNaN() && !value.isInfinite()
            if (value < low) low = value
            if (value > high) high = value
        }
        val reason = when {
            !finite -> "NaN or infinite logits"
            low == 0f && high == 0f -> "all-zero logits"
            low == high -> "constant logits"
            else -> return
        }
        throw ModelException("$reason at $place")
    }

    private fun logSoftmax(logits: FloatArray): DoubleArray {
        val highest = logits.maxOrNull()!!.toDouble()
        val sum = ln(logits.sumOf { exp(it - highest) })
        return DoubleArray(logits.size) { logits[it] - highest - sum }
    }

    private fun foreign(reason: String) = ModelException("golden.npz: $reason; these vectors were made for another model")

    private companion object {
        const val ALLOWED_ERRORS = 3.0
    }
}
