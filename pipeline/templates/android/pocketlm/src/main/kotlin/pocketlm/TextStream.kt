package pocketlm

/** Bytes in, text out, never half a character. Bytes that are no UTF-8 become U+FFFD, one for each longest beginning of a character. */
class Utf8Stream {
    private val pending = ByteArray(4)
    private var held = 0

    /** The characters that became whole with [bytes]. */
    fun push(bytes: ByteArray): String {
        val text = StringBuilder()
        for (byte in bytes) {
            if (held > 0 && !goesOn(byte.toInt() and 0xFF)) {
                text.append(REPLACEMENT)
                held = 0
            }
            begin(byte, text)
        }
        return text.toString()
    }

    /** U+FFFD where a character was begun and not finished. */
    fun finish(): String = if (held > 0) REPLACEMENT.toString().also { held = 0 } else ""

    private fun begin(byte: Byte, text: StringBuilder) {
        val value = byte.toInt() and 0xFF
        if (held == 0 && value < 0x80) {
            text.append(value.toChar())
        } else if (held == 0 && lengthOf(value) == 0) {
            text.append(REPLACEMENT)
        } else {
            pending[held++] = byte
            if (held == lengthOf(pending[0].toInt() and 0xFF)) {
                text.append(String(pending, 0, held, Charsets.UTF_8))
                held = 0
            }
        }
    }

    /** Whether [value] may follow what is held (table 3-7 of the Unicode standard: no surrogates, nothing overlong, at most U+10FFFF). */
    private fun goesOn(value: Int): Boolean {
        if (held > 1) return value in 0x80..0xBF
        return when (pending[0].toInt() and 0xFF) {
            0xE0 -> value in 0xA0..0xBF
            0xED -> value in 0x80..0x9F
            0xF0 -> value in 0x90..0xBF
            0xF4 -> value in 0x80..0x8F
            else -> value in 0x80..0xBF
        }
    }

    /** Bytes of the character that begins with [value]; 0 where none does. */
    private fun lengthOf(value: Int): Int = when (value) {
        in 0xC2..0xDF -> 2
        in 0xE0..0xEF -> 3
        in 0xF0..0xF4 -> 4
        else -> 0
    }

    private companion object {
        const val REPLACEMENT = '\uFFFD'
    }
}

/** Watches for stop texts: what could be the beginning of one is held back until it is known. */
class StopText(stops: List<String>) {
    private val stops = stops.filter { it.isNotEmpty() }
    private val held = StringBuilder()

    /** True once a stop text was seen: nothing more is to be shown. */
    var stopped = false
        private set

    /** What can be shown after [text] came. */
    fun push(text: String): String {
        if (stopped) return ""
        held.append(text)
        val first = stops.map { held.indexOf(it) }.filter { it >= 0 }.minOrNull()
        stopped = first != null
        val shown = held.substring(0, first ?: (held.length - beginning()))
        held.delete(0, if (stopped) held.length else shown.length)
        return shown
    }

    /** What was held back and is no stop text after all. */
    fun finish(): String = held.toString().also { held.setLength(0) }

    /** Length of the longest end of what is held that begins a stop text. */
    private fun beginning(): Int {
        val longest = minOf(held.length, (stops.maxOfOrNull { it.length } ?: 1) - 1)
        for (length in longest downTo 1) {
            val end = held.substring(held.length - length)
            if (stops.any { it.startsWith(end) }) return length
        }
        return 0
    }
}
