package pocketlm

import java.io.File

/** How a text is cut before byte-pair encoding. */
enum class SplitRule { GPT2, CL100K }

/**
 * `tokenizer/text_rules.json`: how this tokenizer cuts text, with its own Unicode classes.
 *
 * The classes come from the tokenizer that the model was trained with: `Character.getType` follows the Unicode version of the
 * Android release and would cut newer scripts otherwise, without a word.
 */
class TextRules internal constructor(
    val split: SplitRule,
    val maxDigits: Int,
    val digitsAlone: Boolean,
    internal val normalForm: NormalForm?,
    val ignoreMerges: Boolean,
    val before: IntArray,
    val after: IntArray,
    private val classes: ByteArray,
) {
    fun isLetter(code: Int): Boolean = has(code, LETTER)

    fun isNumber(code: Int): Boolean = has(code, NUMBER)

    fun isSpace(code: Int): Boolean = has(code, SPACE)

    /** Cut off alone where [digitsAlone] is set. */
    fun isDigit(code: Int): Boolean = has(code, DIGIT)

    fun isOther(code: Int): Boolean = classes[code].toInt() and (LETTER or NUMBER or SPACE) == 0

    private fun has(code: Int, kind: Int) = classes[code].toInt() and kind != 0

    companion object {
        const val FILE = "tokenizer/text_rules.json"
        private const val CODE_POINTS = 0x110000
        private const val LETTER = 1
        private const val NUMBER = 2
        private const val SPACE = 4
        private const val DIGIT = 8

        fun read(file: File): TextRules {
            val fields = file.bufferedReader().use { stream ->
                JsonReader(stream).let { json -> Fields(json.readValue(), FILE).also { json.end() } }
            }
            val classes = ByteArray(CODE_POINTS)
            val kinds = mapOf("letters" to LETTER, "numbers" to NUMBER, "spaces" to SPACE, "digits" to DIGIT)
            for ((name, kind) in kinds) mark(classes, fields.ints(name), kind)
            val split = SplitRule.values().find { it.name.equals(fields.string("split"), ignoreCase = true) }
                ?: throw ModelException("$FILE: unknown split ${fields.string("split")}; take a newer version of this library")
            fun table(name: String) = fields.ints(name)
            return TextRules(
                split = split,
                maxDigits = fields.int("max_digits"),
                digitsAlone = fields.flag("digits_alone"),
                normalForm = if (fields.flag("nfc")) NormalForm.of(table("marks"), table("pairs"), table("apart")) else null,
                ignoreMerges = fields.flag("ignore_merges"),
                before = fields.ints("before").toIntArray(),
                after = fields.ints("after").toIntArray(),
                classes = classes,
            )
        }

        /** [runs] are, in turn, how many code points are not of the kind and how many are. */
        private fun mark(classes: ByteArray, runs: List<Int>, kind: Int) {
            var code = 0
            for ((place, length) in runs.withIndex()) {
                if (length < 0 || code + length > CODE_POINTS) throw ModelException("$FILE: damaged; take the bundle again")
                if (place % 2 == 1) for (member in code until code + length) classes[member] = (classes[member].toInt() or kind).toByte()
                code += length
            }
        }
    }
}

/**
 * Cuts code points into the pieces that byte-pair encoding does not cross, as the regular expressions of GPT-2 and of cl100k
 * (Llama 3, Qwen 2 and 3) do. By hand, because `\s` and `\p{L}` are not the same in Java and in Android's ICU.
 */
internal class Splitter(private val rules: TextRules) {

    /** Calls [piece] with begin and end of every piece of [text] between [begin] and [end]. */
    fun split(text: IntArray, begin: Int, end: Int, piece: (Int, Int) -> Unit) {
        if (!rules.digitsAlone) return words(text, begin, end, piece)
        var start = begin
        for (place in begin until end) {
            if (!rules.isDigit(text[place])) continue
            words(text, start, place, piece)
            words(text, place, place + 1, piece)
            start = place + 1
        }
        words(text, start, end, piece)
    }

    private fun words(text: IntArray, begin: Int, end: Int, piece: (Int, Int) -> Unit) {
        var start = begin
        while (start < end) {
            val stop = if (rules.split == SplitRule.GPT2) gpt2(text, start, end) else cl100k(text, start, end)
            piece(start, stop)
            start = stop
        }
    }

    /** `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+` */
    private fun gpt2(text: IntArray, start: Int, end: Int): Int {
        val contracted = contraction(text, start, end, ignoreCase = false)
        if (contracted > 0) return contracted
        val word = if (text[start] == BLANK && start + 1 < end) start + 1 else start
        val first = text[word]
        return when {
            rules.isLetter(first) -> run(text, word, end, rules::isLetter)
            rules.isNumber(first) -> run(text, word, end, rules::isNumber)
            !rules.isSpace(first) -> run(text, word, end, rules::isOther)
            else -> spaces(text, start, end)
        }
    }

    /** `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,n}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+` */
    private fun cl100k(text: IntArray, start: Int, end: Int): Int {
        val contracted = contraction(text, start, end, ignoreCase = true)
        if (contracted > 0) return contracted
        val first = text[start]
        val second = if (start + 1 < end) text[start + 1] else -1
        if (rules.isLetter(first)) return run(text, start, end, rules::isLetter)
        val mayLead = !rules.isNumber(first) && !isBreak(first)
        if (mayLead && second >= 0 && rules.isLetter(second)) return run(text, start + 1, end, rules::isLetter)
        if (rules.isNumber(first)) return run(text, start, minOf(end, start + rules.maxDigits), rules::isNumber)
        val mark = if (first == BLANK && second >= 0) start + 1 else start
        if (rules.isOther(text[mark])) return run(text, run(text, mark, end, rules::isOther), end, ::isBreak)
        val stop = run(text, start, end, rules::isSpace)
        for (place in stop - 1 downTo start) if (isBreak(text[place])) return place + 1
        return spaces(text, start, end)
    }

    /** `\s+(?!\S)|\s+`: the last blank before a word belongs to the word. */
    private fun spaces(text: IntArray, start: Int, end: Int): Int {
        val stop = run(text, start, end, rules::isSpace)
        return if (stop == end || stop - start == 1) stop else stop - 1
    }

    private inline fun run(text: IntArray, start: Int, end: Int, belongs: (Int) -> Boolean): Int {
        var place = start
        while (place < end && belongs(text[place])) place++
        return place
    }

    private fun contraction(text: IntArray, start: Int, end: Int, ignoreCase: Boolean): Int {
        if (text[start] != APOSTROPHE) return 0
        for (word in CONTRACTIONS) {
            if (start + word.length >= end) continue
            if (word.indices.all { same(text[start + 1 + it], word[it].code, ignoreCase) }) return start + 1 + word.length
        }
        return 0
    }

    private fun same(code: Int, letter: Int, ignoreCase: Boolean): Boolean =
        code == letter || (ignoreCase && (code == letter - CASE || (letter == 's'.code && code == LONG_S)))

    private fun isBreak(code: Int) = code == '\r'.code || code == '\n'.code

    private companion object {
        const val BLANK = ' '.code
        const val APOSTROPHE = '\''.code
        const val CASE = 'a'.code - 'A'.code
        const val LONG_S = 0x17F // folds to s
        val CONTRACTIONS = listOf("s", "t", "re", "ve", "m", "ll", "d")
    }
}
