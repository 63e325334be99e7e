package pocketlm

/**
 * The lengths of the calls, longest first, that take a prompt of [tokens] in the least time, out of [lengths], the shortest first: a
 * call's time is its length and [CALL_TOKENS]. Of equal times it is the fewest calls. Padding costs what tokens cost, and only the
 * last call is padded. The counterpart of `cover` in `device_tests/tflite_session.py`.
 */
internal fun promptCalls(tokens: Int, lengths: List<Int>): List<Int> {
    val cost = IntArray(tokens + 1) // by number of tokens
    val calls = IntArray(tokens + 1)
    val last = IntArray(tokens + 1) // the length of one of them
    for (count in 1..tokens) {
        cost[count] = Int.MAX_VALUE
        for (length in lengths) {
            val before = maxOf(0, count - length)
            val (newCost, newCalls) = cost[before] + length + CALL_TOKENS to calls[before] + 1
            if (newCost < cost[count] || (newCost == cost[count] && newCalls < calls[count])) {
                cost[count] = newCost
                calls[count] = newCalls
                last[count] = length
            }
        }
    }
    val found = ArrayList<Int>()
    var left = tokens
    while (left > 0) {
        found.add(last[left])
        left -= last[left]
    }
    return found.sortedDescending()
}

private const val CALL_TOKENS = 16 // tokens of a prompt that take as long as a call by itself does, which reads all weights
