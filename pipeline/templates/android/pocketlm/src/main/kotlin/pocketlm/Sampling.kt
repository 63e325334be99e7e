package pocketlm

import kotlin.math.exp
import kotlin.math.min

/** How a token is drawn: [temperature] 0 takes the most likely one; [topK] 0 and [topP] 1 cut nothing off. */
data class Sampling(val temperature: Double = 0.0, val topK: Int = 0, val topP: Double = 1.0) {
    init {
        require(temperature >= 0 && temperature < Double.POSITIVE_INFINITY) { "temperature $temperature: give 0 or more" }
        require(topK >= 0) { "topK $topK: give 0 or more" }
        require(topP > 0 && topP <= 1) { "topP $topP: give more than 0 and at most 1" }
    }
}

/** Ids that may be drawn, and their probabilities up to a common factor. */
internal class Candidates(val ids: IntArray, val shares: DoubleArray)

/**
 * Draws from [logits] `[vocab]`: temperature, then the [Sampling.topK] likeliest, then the fewest that hold [Sampling.topP] together
 * (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751).
 *
 * [uniform] gives one number in [0, 1) for each token that is not greedy. Of equal logits the lower id comes first. The same seed
 * gives the same text as `device_tests/sampling.py` in the bundle.
 */
fun nextToken(logits: FloatArray, sampling: Sampling, uniform: () -> Double): Int {
    val likeliest = argmax(logits)
    if (logits[likeliest].isNaN() || logits[likeliest].isInfinite()) throw ModelException("the model answered with NaN or infinite logits")
    if (sampling.temperature == 0.0) return likeliest
    val found = candidates(logits, sampling)
    val held = running(found.shares)
    val point = uniform() * held.last()
    var low = 0
    var high = held.size
    while (low < high) { // the first place whose running sum is greater
        val middle = (low + high) ushr 1
        if (held[middle] <= point) low = middle + 1 else high = middle
    }
    return found.ids[min(low, found.ids.size - 1)]
}

/** The place of the largest number, the first of equals. */
fun argmax(logits: FloatArray): Int {
    var best = 0
    for (id in 1 until logits.size) if (logits[id] > logits[best] || logits[best].isNaN()) best = id
    return best
}

internal fun candidates(logits: FloatArray, sampling: Sampling): Candidates {
    val scaled = DoubleArray(logits.size) { logits[it] / sampling.temperature }
    if (sampling.topK == 0 && sampling.topP == 1.0) {
        val highest = scaled[argmax(logits)]
        return Candidates(IntArray(scaled.size) { it }, DoubleArray(scaled.size) { exp(scaled[it] - highest) })
    }
    val kept = min(if (sampling.topK == 0) scaled.size else sampling.topK, scaled.size)
    if (sampling.topP == 1.0) {
        val ids = likeliest(scaled, kept)
        return Candidates(ids, weights(scaled, ids))
    }
    return nucleus(scaled, kept, sampling.topP)
}

/** The fewest of the [kept] likeliest that hold [share] of the probability of those. */
private fun nucleus(scaled: DoubleArray, kept: Int, share: Double): Candidates {
    val all = kept == scaled.size
    val highest = scaled.maxOrNull()!!
    val total = if (all) scaled.sumOf { exp(it - highest) } else 0.0
    var tried = min(FIRST_TRIED, kept)
    while (true) {
        val ids = likeliest(scaled, if (all) tried else kept)
        val weights = weights(scaled, ids)
        val held = running(weights)
        val wanted = share * (if (all) total else held.last())
        if (!all || held.last() >= wanted || tried == kept) {
            val count = min(held.indexOfFirst { it >= wanted }.let { if (it < 0) held.size else it } + 1, ids.size)
            return Candidates(ids.copyOf(count), weights.copyOf(count))
        }
        tried = min(tried * MORE, kept)
    }
}

private fun weights(scaled: DoubleArray, ids: IntArray) = DoubleArray(ids.size) { exp(scaled[ids[it]] - scaled[ids[0]]) }

private fun running(values: DoubleArray): DoubleArray {
    val sums = DoubleArray(values.size)
    var sum = 0.0
    for (place in values.indices) {
        sum += values[place]
        sums[place] = sum
    }
    return sums
}

/** Ids of the [count] largest of [values], largest first, of equal ones the lower id first. Only those are sorted. */
internal fun likeliest(values: DoubleArray, count: Int): IntArray {
    val ids = if (count < values.size) largest(values, count) else IntArray(values.size) { it }
    // not compareTo, for which 0.0 is greater than -0.0
    return ids.sortedWith { a, b -> if (values[a] > values[b]) -1 else if (values[a] < values[b]) 1 else a - b }.toIntArray()
}

/** Ids of the [count] largest in the order of ids; of equal ones the lower. */
private fun largest(values: DoubleArray, count: Int): IntArray {
    val least = nth(values.copyOf(), values.size - count)
    val ids = IntArray(count)
    var room = count - values.count { it > least } // for those that are equal to the least
    var place = 0
    for (id in values.indices) {
        if (values[id] > least || (values[id] == least && room-- > 0)) ids[place++] = id
    }
    return ids
}

/** The number that would stand at [place] if [values] were sorted (Hoare's quickselect, with the median of three as pivot). */
private fun nth(values: DoubleArray, place: Int): Double {
    var low = 0
    var high = values.size - 1
    while (low < high) {
        val pivot = median(values[low], values[(low + high) ushr 1], values[high])
        var left = low
        var right = high
        while (left <= right) {
            while (values[left] < pivot) left++
            while (values[right] > pivot) right--
            if (left <= right) {
                val held = values[left]
                values[left++] = values[right]
                values[right--] = held
            }
        }
        if (place <= right) high = right else if (place >= left) low = left else return values[place]
    }
    return values[low]
}

private fun median(a: Double, b: Double, c: Double): Double = maxOf(minOf(a, b), minOf(maxOf(a, b), c))

private const val FIRST_TRIED = 64
private const val MORE = 8
