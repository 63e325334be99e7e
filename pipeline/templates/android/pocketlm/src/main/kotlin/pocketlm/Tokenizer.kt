package pocketlm

import java.io.File
import java.util.PriorityQueue

/** Text to ids and ids to bytes: byte-level BPE read from a Hugging Face `tokenizer.json`. It can be used from several threads. */
class Tokenizer private constructor(private val rules: TextRules, private val parts: TokenizerParts) {
    private val splitter = Splitter(rules)

    /** Ids of [text], with those that this tokenizer puts before and after every text. Added tokens in the text are found. */
    fun encode(text: String): IntArray {
        val ids = IntList()
        rules.before.forEach(ids::add)
        parts.exactTokens.split(codePoints(text), ids::add) { plain ->
            val normal = rules.normalForm?.compose(plain) ?: plain
            parts.normalTokens.split(normal, ids::add) { piece ->
                splitter.split(piece, 0, piece.size) { begin, end -> encodePiece(piece, begin, end, ids) }
            }
        }
        rules.after.forEach(ids::add)
        return ids.toArray()
    }

    /** UTF-8 of a token; it may begin or end inside a character. */
    fun bytesOf(id: Int): ByteArray = parts.bytes.getOrNull(id) ?: EMPTY

    /** The text of [ids]; bytes that are no UTF-8 become U+FFFD. */
    fun decode(ids: IntArray): String {
        val stream = Utf8Stream()
        val text = StringBuilder()
        for (id in ids) text.append(stream.push(bytesOf(id)))
        return text.append(stream.finish()).toString()
    }

    private fun encodePiece(text: IntArray, begin: Int, end: Int, ids: IntList) {
        val bytes = String(text, begin, end - begin).toByteArray(Charsets.UTF_8)
        val whole = if (rules.ignoreMerges) parts.words[symbols(bytes)] else null
        if (whole != null) ids.add(whole) else merge(bytes, ids)
    }

    /** Joins neighbours in the order of the merges, of equal ones the left first. */
    private fun merge(bytes: ByteArray, ids: IntList) {
        val symbol = IntArray(bytes.size) { parts.byteIds[bytes[it].toInt() and 0xFF] }
        val before = IntArray(bytes.size) { it - 1 }
        val after = IntArray(bytes.size) { if (it + 1 < bytes.size) it + 1 else -1 }
        val queue = PriorityQueue<Long>() // rank above place
        fun offer(place: Int) {
            if (place < 0 || after[place] < 0) return
            val rank = parts.merges.rank(symbol[place], symbol[after[place]])
            if (rank >= 0) queue.add(rank.toLong() shl 32 or place.toLong())
        }
        for (place in bytes.indices) offer(place)
        while (true) {
            val entry = queue.poll() ?: break
            val place = entry.toInt()
            val right = if (symbol[place] < 0) -1 else after[place]
            if (right < 0) continue
            val rank = parts.merges.rank(symbol[place], symbol[right])
            if (rank != (entry ushr 32).toInt()) continue // one of the two was joined otherwise meanwhile
            symbol[place] = parts.merges.merged(rank)
            symbol[right] = GONE
            after[place] = after[right]
            if (after[place] >= 0) before[after[place]] = place
            offer(before[place])
            offer(place)
        }
        var place = if (bytes.isEmpty()) -1 else 0
        while (place >= 0) {
            ids.add(symbol[place])
            place = after[place]
        }
    }

    companion object {
        private const val GONE = -1
        private val EMPTY = ByteArray(0)

        /** Reads `tokenizer.json` and `text_rules.json`. ModelException where they are damaged. */
        fun read(tokenizer: File, rules: File): Tokenizer {
            val found = TextRules.read(rules)
            val parts = tokenizer.bufferedReader().use { TokenizerParts.read(JsonReader(it), keepWords = found.ignoreMerges) }
            return Tokenizer(found, parts)
        }

        /** Code points of a text; half a surrogate pair becomes U+FFFD, which UTF-8 can hold. */
        internal fun codePoints(text: String): IntArray {
            val codes = IntList()
            var place = 0
            while (place < text.length) {
                val code = text.codePointAt(place)
                codes.add(if (code in 0xD800..0xDFFF) 0xFFFD else code)
                place += Character.charCount(code)
            }
            return codes.toArray()
        }

        /** The bytes in the 256 printable symbols of byte-level BPE. */
        internal fun symbols(bytes: ByteArray): String = String(CharArray(bytes.size) { SYMBOLS[bytes[it].toInt() and 0xFF] })

        /** GPT-2: printable bytes stand for themselves, the others from U+0100 on. */
        internal val SYMBOLS: CharArray = CharArray(256).also { symbols ->
            var other = 256
            for (byte in 0..255) {
                val printable = byte in 0x21..0x7E || byte in 0xA1..0xAC || byte in 0xAE..0xFF
                symbols[byte] = if (printable) byte.toChar() else (other++).toChar()
            }
        }
    }
}

/** Ints that grow. */
internal class IntList {
    private var items = IntArray(64)
    var size = 0
        private set

    fun add(item: Int) {
        if (size == items.size) items = items.copyOf(2 * size)
        items[size++] = item
    }

    fun toArray(): IntArray = items.copyOf(size)
}
