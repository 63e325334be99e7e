package pocketlm

/** What `tokenizer.json` holds, in the form that encoding and decoding need. */
internal class TokenizerParts private constructor(
    val bytes: Array<ByteArray?>,
    val byteIds: IntArray,
    val merges: Merges,
    val exactTokens: AddedTokens,
    val normalTokens: AddedTokens,
    val words: Map<String, Int>,
) {
    companion object {
        private const val NAME = "tokenizer.json"

        fun read(json: JsonReader, keepWords: Boolean): TokenizerParts {
            val vocabulary = HashMap<String, Int>()
            val pairs = ArrayList<String>() // left and right in turn
            val added = ArrayList<AddedToken>()
            json.readObject { name ->
                when (name) {
                    "model" -> json.readObject { part ->
                        when (part) {
                            "vocab" -> json.readObject { vocabulary[it] = json.readInt() }
                            "merges" -> json.readArray { readPair(json, pairs) }
                            else -> json.skipValue()
                        }
                    }
                    "added_tokens" -> json.readArray { added.add(AddedToken.of(Fields(json.readValue(), NAME))) }
                    else -> json.skipValue()
                }
            }
            json.end()
            return of(vocabulary, pairs, added, keepWords)
        }

        /** A merge is `"left right"` or `["left", "right"]`, as the library's version wrote it. */
        private fun readPair(json: JsonReader, pairs: MutableList<String>) {
            val start = pairs.size
            if (json.atArray()) {
                json.readArray { pairs.add(json.readString()) }
            } else {
                pairs.addAll(json.readString().split(' '))
            }
            if (pairs.size != start + 2) throw ModelException("$NAME: a merge is no pair; take the bundle again")
        }

        private fun of(vocabulary: Map<String, Int>, pairs: List<String>, added: List<AddedToken>, keepWords: Boolean): TokenizerParts {
            fun idOf(symbols: String) = vocabulary[symbols] ?: throw ModelException("$NAME: no token $symbols; take the bundle again")
            val merges = Merges(pairs.size / 2)
            for (rank in 0 until pairs.size / 2) {
                val (left, right) = pairs[2 * rank] to pairs[2 * rank + 1]
                merges.add(idOf(left), idOf(right), rank, idOf(left + right))
            }
            val bytes = arrayOfNulls<ByteArray>(1 + maxOf(vocabulary.values.maxOrNull() ?: -1, added.maxOfOrNull { it.id } ?: -1))
            for ((symbols, id) in vocabulary) bytes[id] = bytesOf(symbols)
            for (token in added) bytes[token.id] = bytesOf(token.text)
            val byteIds = IntArray(256) { idOf(Tokenizer.SYMBOLS[it].toString()) }
            val (normal, exact) = added.partition { it.normalized }
            val words = if (keepWords) vocabulary else emptyMap()
            return TokenizerParts(bytes, byteIds, merges, AddedTokens(exact), AddedTokens(normal), words)
        }

        /** The bytes behind the symbols; a token that is not written in them, as an added one may be, stands for its own UTF-8. */
        private fun bytesOf(token: String): ByteArray {
            val written = ByteArray(token.length)
            for ((place, symbol) in token.withIndex()) {
                val byte = BYTES[symbol] ?: return token.toByteArray(Charsets.UTF_8)
                written[place] = byte.toByte()
            }
            return written
        }

        private val BYTES: Map<Char, Int> = Tokenizer.SYMBOLS.withIndex().associate { (byte, symbol) -> symbol to byte }
    }
}

/** A token that stands for itself wherever its text appears. */
internal class AddedToken(val id: Int, val text: String, val normalized: Boolean) {
    companion object {
        fun of(fields: Fields) = AddedToken(fields.int("id"), fields.string("content"), fields.flag("normalized"))
    }
}

/** Finds added tokens, the leftmost first and of those that begin together the longest. */
internal class AddedTokens(tokens: List<AddedToken>) {
    private val byFirst: Map<Int, List<Pair<IntArray, Int>>> = tokens.filter { it.text.isNotEmpty() }
        .map { Tokenizer.codePoints(it.text) to it.id }
        .groupBy { it.first[0] }
        .mapValues { (_, same) -> same.sortedByDescending { it.first.size } }

    /** Calls [token] with the id of every added token in [text], and [plain] with what lies between, in order. */
    fun split(text: IntArray, token: (Int) -> Unit, plain: (IntArray) -> Unit) {
        var start = 0
        var place = 0
        while (place < text.size) {
            val found = byFirst[text[place]]?.find { (codes, _) -> matches(text, place, codes) }
            if (found == null) {
                place++
                continue
            }
            if (place > start) plain(text.copyOfRange(start, place))
            token(found.second)
            place += found.first.size
            start = place
        }
        if (start < text.size) plain(if (start == 0) text else text.copyOfRange(start, text.size))
    }

    private fun matches(text: IntArray, place: Int, codes: IntArray): Boolean =
        place + codes.size <= text.size && codes.indices.all { text[place + it] == codes[it] }
}

/** The merges by their pair of ids: an open hash table of Longs, because a map of 150 000 boxed pairs takes tens of megabytes. */
internal class Merges(count: Int) {
    private val slots = Integer.highestOneBit(maxOf(4, 2 * count)) shl 1
    private val pairs = LongArray(slots) { NONE }
    private val ranks = IntArray(slots)
    private val results = IntArray(count)

    /** The first of equal pairs counts least: a later one replaces it, as in the tokenizers library. */
    fun add(left: Int, right: Int, rank: Int, merged: Int) {
        val slot = slotOf(pair(left, right))
        pairs[slot] = pair(left, right)
        ranks[slot] = rank
        results[rank] = merged
    }

    /** The rank of a pair, or -1. */
    fun rank(left: Int, right: Int): Int {
        val slot = slotOf(pair(left, right))
        return if (pairs[slot] == NONE) -1 else ranks[slot]
    }

    /** The id that the pair of [rank] becomes. */
    fun merged(rank: Int): Int = results[rank]

    private fun pair(left: Int, right: Int): Long = left.toLong() shl 32 or right.toLong()

    private fun slotOf(pair: Long): Int {
        val mixed = pair * -0x61c8864680b583ebL // 2^64 over the golden ratio: Knuth's multiplicative hashing
        var slot = (mixed ushr 32).toInt() and (slots - 1)
        while (pairs[slot] != NONE && pairs[slot] != pair) slot = (slot + 1) and (slots - 1)
        return slot
    }

    private companion object {
        const val NONE = -1L
    }
}
