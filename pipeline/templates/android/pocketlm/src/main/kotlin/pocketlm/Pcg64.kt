package pocketlm

/**
 * numpy's `default_rng(seed)`: PCG XSL RR 128/64 (O'Neill 2014) seeded through SeedSequence, so that a seed draws the same numbers
 * here and in the bundle's Python programs. 128-bit numbers are two Longs, the high one first.
 */
class Pcg64(seed: Long) {
    private var high = 0L
    private var low = 0L
    private val increment: LongArray

    init {
        require(seed >= 0) { "seed $seed: give 0 or more" }
        val words = seedWords(seed)
        increment = longArrayOf((words[2] shl 1) or (words[3] ushr 63), (words[3] shl 1) or 1L)
        step()
        add(words[0], words[1])
        step()
    }

    /** The next number in [0, 1), of 53 bits. */
    fun nextDouble(): Double {
        step()
        val rotated = java.lang.Long.rotateRight(high xor low, (high ushr 58).toInt())
        return (rotated ushr 11) * (1.0 / (1L shl 53))
    }

    private fun step() {
        val newHigh = multiplyHigh(low, MULTIPLIER_LOW) + high * MULTIPLIER_LOW + low * MULTIPLIER_HIGH
        low *= MULTIPLIER_LOW
        high = newHigh
        add(increment[0], increment[1])
    }

    private fun add(addHigh: Long, addLow: Long) {
        val sum = low + addLow
        high += addHigh + (if (java.lang.Long.compareUnsigned(sum, low) < 0) 1 else 0)
        low = sum
    }

    private companion object {
        const val MULTIPLIER_HIGH = 0x2360ED051FC65DA4L
        const val MULTIPLIER_LOW = 0x4385DF649FCCF645L
        const val POOL = 4

        /** The high 64 bits of the product of two unsigned numbers; Math.multiplyHigh came with Android 12. */
        fun multiplyHigh(a: Long, b: Long): Long {
            val mask = 0xFFFFFFFFL
            val lowLow = (a and mask) * (b and mask)
            val highLow = (a ushr 32) * (b and mask) + (lowLow ushr 32)
            val lowHigh = (a and mask) * (b ushr 32) + (highLow and mask)
            return (a ushr 32) * (b ushr 32) + (highLow ushr 32) + (lowHigh ushr 32)
        }

        /** SeedSequence(seed).generate_state(4, uint64). */
        fun seedWords(seed: Long): LongArray {
            val entropy = intArrayOf(seed.toInt(), (seed ushr 32).toInt())
            val pool = IntArray(POOL)
            var constant = 0x43b0d7e5
            fun hashed(value: Int): Int {
                var mixed = value xor constant
                constant *= 0x931e8875.toInt()
                mixed *= constant
                return mixed xor (mixed ushr 16)
            }
            for (place in 0 until POOL) pool[place] = hashed(if (place < entropy.size) entropy[place] else 0)
            for (source in 0 until POOL) for (target in 0 until POOL) {
                if (source == target) continue
                val mixed = pool[target] * 0xca01f9dd.toInt() - hashed(pool[source]) * 0x4973f715
                pool[target] = mixed xor (mixed ushr 16)
            }
            constant = 0x8b51f9dd.toInt()
            val state = IntArray(8) { place ->
                var mixed = pool[place % POOL] xor constant
                constant *= 0x58f38ded
                mixed *= constant
                mixed xor (mixed ushr 16)
            }
            return LongArray(4) { (state[2 * it].toLong() and 0xFFFFFFFFL) or (state[2 * it + 1].toLong() shl 32) }
        }
    }
}
