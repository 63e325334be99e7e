package pocketlm

import java.io.Reader

/** Text that is no JSON, or no JSON of the kind that was expected. */
class BadJson(message: String) : ModelException(message)

/**
 * Reads JSON (RFC 8259) from a stream, value by value, so that a tokenizer of many megabytes never stands in memory as a tree.
 *
 * Whole numbers become Long, others Double. Every function reads exactly one value.
 */
class JsonReader(private val source: Reader) {
    private val block = CharArray(8192)
    private var filled = 0
    private var next = 0
    private var before = 0L // characters of earlier blocks
    private var depth = 0
    private val text = StringBuilder()

    /** The value as Map, List, String, Long, Double, Boolean or null. */
    fun readValue(): Any? = when (val first = peekToken()) {
        '{' -> LinkedHashMap<String, Any?>().also { map -> readObject { map[it] = readValue() } }
        '[' -> ArrayList<Any?>().also { list -> readArray { list.add(readValue()) } }
        '"' -> readString()
        't' -> word("true", true)
        'f' -> word("false", false)
        'n' -> word("null", null)
        else -> if (first == '-' || first in '0'..'9') number() else throw bad("unexpected '$first'")
    }

    /** Calls [member] with every name of an object; it must read the value, or [skipValue]. */
    fun readObject(member: (String) -> Unit) = inside('{', '}') {
        if (peekToken() != '"') throw bad("a name must be a string")
        val name = readString()
        expect(':')
        member(name)
    }

    /** Calls [element] for every value of an array; it must read the value, or [skipValue]. */
    fun readArray(element: () -> Unit) = inside('[', ']', element)

    fun readString(): String {
        expect('"')
        text.setLength(0)
        while (true) {
            val character = take()
            when {
                character == '"' -> return text.toString()
                character == '\\' -> text.append(escaped())
                character < ' ' -> throw bad("a control character inside a string")
                else -> text.append(character)
            }
        }
    }

    fun readInt(): Int {
        val value = readValue()
        if (value !is Long || value < Int.MIN_VALUE || value > Int.MAX_VALUE) throw bad("a whole number is expected, not $value")
        return value.toInt()
    }

    fun skipValue() {
        when (peekToken()) {
            '{' -> readObject { skipValue() }
            '[' -> readArray { skipValue() }
            else -> readValue()
        }
    }

    /** True where the next value is an array. */
    fun atArray(): Boolean = peekToken() == '['

    /** To be called after the last value: nothing but blanks may follow. */
    fun end() {
        skipBlanks()
        if (available()) throw bad("text after the end")
    }

    private fun inside(open: Char, close: Char, part: () -> Unit) {
        expect(open)
        if (++depth > MAX_DEPTH) throw bad("more than $MAX_DEPTH levels")
        if (peekToken() == close) {
            take()
        } else {
            while (true) {
                part()
                val character = peekToken()
                take()
                if (character == close) break
                if (character != ',') throw bad("',' or '$close' is expected, not '$character'")
            }
        }
        depth--
    }

    private fun escaped(): Char = when (val character = take()) {
        '"', '\\', '/' -> character
        'b' -> '\b'
        'f' -> '\u000C'
        'n' -> '\n'
        'r' -> '\r'
        't' -> '\t'
        'u' -> {
            var code = 0
            repeat(4) {
                val digit = take()
                val value = if (digit < '\u0080') Character.digit(digit, 16) else -1 // digits of other scripts are none in JSON
                if (value < 0) throw bad("\\u needs four hexadecimal digits")
                code = code * 16 + value
            }
            code.toChar()
        }
        else -> throw bad("unknown escape \\$character")
    }

    private fun number(): Any {
        text.setLength(0)
        while (available() && (block[next] in '0'..'9' || block[next] in "+-.eE")) text.append(take())
        val written = text.toString()
        if (!NUMBER.matches(written)) throw bad("'$written' is no number")
        return written.toLongOrNull() ?: written.toDouble()
    }

    private fun <T> word(word: String, value: T): T {
        for (expected in word) if (take() != expected) throw bad("$word is expected")
        return value
    }

    private fun expect(character: Char) {
        val found = peekToken()
        if (found != character) throw bad("'$character' is expected, not '$found'")
        take()
    }

    private fun peekToken(): Char {
        skipBlanks()
        if (!available()) throw bad("it ends too early")
        return block[next]
    }

    private fun skipBlanks() {
        while (available() && (block[next] == ' ' || block[next] == '\n' || block[next] == '\r' || block[next] == '\t')) next++
    }

    private fun take(): Char {
        if (!available()) throw bad("it ends too early")
        return block[next++]
    }

    private fun available(): Boolean {
        while (next == filled) {
            before += filled
            next = 0
            filled = 0
            val count = source.read(block)
            if (count < 0) return false
            filled = count
        }
        return true
    }

    private fun bad(reason: String) = BadJson("no JSON at character ${before + next}: $reason")

    private companion object {
        const val MAX_DEPTH = 200
        val NUMBER = Regex("-?(0|[1-9][0-9]*)([.][0-9]+)?([eE][+-]?[0-9]+)?")
    }
}
