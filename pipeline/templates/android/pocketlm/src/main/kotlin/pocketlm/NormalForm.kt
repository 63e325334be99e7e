package pocketlm

/**
 * Unicode's normal form C (UAX #15) by the tokenizer's own tables: `java.text.Normalizer` follows the Unicode version of the Android
 * release, and composes or reorders what the tokenizer does not, or the other way round.
 */
internal class NormalForm private constructor(
    private val classes: Map<Int, Int>,
    private val decompositions: Map<Int, IntArray>,
    private val compositions: Map<Long, Int>,
) {
    fun compose(text: IntArray): IntArray {
        if (text.all { it < FIRST_CONCERNED }) return text
        val apart = IntList()
        for (code in text) decompose(code, apart)
        return joined(ordered(apart.toArray()))
    }

    private fun decompose(code: Int, into: IntList) {
        val hangul = code - HANGUL_FIRST
        val parts = decompositions[code]
        when {
            hangul in 0 until HANGUL_COUNT -> {
                into.add(LEADING_FIRST + hangul / (VOWELS * TRAILS))
                into.add(VOWEL_FIRST + hangul % (VOWELS * TRAILS) / TRAILS)
                if (hangul % TRAILS > 0) into.add(TRAIL_FIRST + hangul % TRAILS)
            }
            parts == null -> into.add(code)
            else -> for (part in parts) decompose(part, into)
        }
    }

    /** Marks between two starters in the order of their classes, equal ones as they stood. */
    private fun ordered(text: IntArray): IntArray {
        var start = 0
        while (start < text.size) {
            var end = start
            while (end < text.size && classOf(text[end]) > 0) end++
            if (end - start > 1) {
                text.copyOfRange(start, end).sortedBy(::classOf).forEachIndexed { place, code -> text[start + place] = code }
            }
            start = end + 1
        }
        return text
    }

    /** Joins each character with the last starter before it, unless a mark of the same class, or a starter, stands between. */
    private fun joined(text: IntArray): IntArray {
        val out = IntArray(text.size)
        var size = 0
        var starter = -1
        var lastClass = 0
        for (code in text) {
            val kind = classOf(code)
            val blocked = starter < 0 || (size - 1 > starter && (lastClass == 0 || lastClass >= kind))
            val whole = if (blocked) null else join(out[starter], code)
            if (whole != null) {
                out[starter] = whole
                continue
            }
            if (kind == 0) starter = size
            lastClass = kind
            out[size++] = code
        }
        return out.copyOf(size)
    }

    private fun join(first: Int, second: Int): Int? {
        val (leading, vowel) = first - LEADING_FIRST to second - VOWEL_FIRST
        if (leading in 0 until LEADS && vowel in 0 until VOWELS) return HANGUL_FIRST + (leading * VOWELS + vowel) * TRAILS
        val (syllable, trail) = first - HANGUL_FIRST to second - TRAIL_FIRST
        if (syllable in 0 until HANGUL_COUNT && syllable % TRAILS == 0 && trail in 1 until TRAILS) return first + trail
        return compositions[pair(first, second)]
    }

    private fun classOf(code: Int): Int = classes[code] ?: 0

    companion object {
        private const val FIRST_CONCERNED = 0x300 // whatever lies below is in normal form C
        private const val HANGUL_FIRST = 0xAC00
        private const val LEADING_FIRST = 0x1100
        private const val VOWEL_FIRST = 0x1161
        private const val TRAIL_FIRST = 0x11A7
        private const val LEADS = 19
        private const val VOWELS = 21
        private const val TRAILS = 28
        private const val HANGUL_COUNT = LEADS * VOWELS * TRAILS

        /** From the flat lists of `text_rules.json`: code and class; code, first and second of what composes; the same of what does not. */
        fun of(marks: List<Int>, pairs: List<Int>, apart: List<Int>): NormalForm {
            val decompositions = (pairs.chunked(3) + apart.chunked(3)).associate { (code, first, second) ->
                code to (if (second == 0) intArrayOf(first) else intArrayOf(first, second))
            }
            return NormalForm(
                marks.chunked(2).associate { (code, kind) -> code to kind },
                decompositions,
                pairs.chunked(3).associate { (code, first, second) -> pair(first, second) to code },
            )
        }

        private fun pair(first: Int, second: Int): Long = first.toLong() shl 32 or second.toLong()
    }
}
