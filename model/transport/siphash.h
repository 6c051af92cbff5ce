// SipHash-2-4: 64 bits by which a short message is signed (Aumasson, Bernstein: "SipHash: a fast short-input PRF", 2012).
#pragma once

#include <stdint.h>
#include <string.h>

enum { SIPHASH_KEY_BYTES = 16 };

static uint64_t rotated_left(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }

static void sip_rounds(uint64_t v[4], int num) {
    while (num--) {
        v[0] += v[1]; v[1] = rotated_left(v[1], 13) ^ v[0]; v[0] = rotated_left(v[0], 32);
        v[2] += v[3]; v[3] = rotated_left(v[3], 16) ^ v[2];
        v[0] += v[3]; v[3] = rotated_left(v[3], 21) ^ v[0];
        v[2] += v[1]; v[1] = rotated_left(v[1], 17) ^ v[2]; v[2] = rotated_left(v[2], 32);
    }
}

uint64_t siphash(const unsigned char *key, const unsigned char *bytes, uint64_t num_bytes) {
    uint64_t k[2], word = num_bytes << 56;
    memcpy(k, key, sizeof k);
    uint64_t v[4] = {k[0] ^ 0x736f6d6570736575ull, k[1] ^ 0x646f72616e646f6dull, k[0] ^ 0x6c7967656e657261ull,
                     k[1] ^ 0x7465646279746573ull};
    for (; num_bytes >= 8; num_bytes -= 8, bytes += 8) {
        uint64_t whole;
        memcpy(&whole, bytes, sizeof whole);
        v[3] ^= whole;
        sip_rounds(v, 2);
        v[0] ^= whole;
    }
    for (uint64_t i = 0; i < num_bytes; i++) word |= (uint64_t)bytes[i] << 8 * i;
    v[3] ^= word;
    sip_rounds(v, 2);
    v[0] ^= word;
    v[2] ^= 0xff;
    sip_rounds(v, 4);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}
