// Written by coefficients.py, to which it is compared by tests/test_coefficients.py.
// clang-format off
#pragma once

#include <stdint.h>

namespace softmaxlib {

// kExp32: e^t = 1 + t q(t), |t| <= 1.02 ln2/16 = 0.044188133, q of degree 2
// c0 free: max relative error 2^-25.09 rounded, 2^-25.12 before rounding (chosen)
// c0 = 1: max relative error 2^-25.09 rounded, 2^-25.09 before rounding
constexpr float kExp32[3] = {
    0x1p+0f,                    // 1.0
    0x1.0008ccp-1f,             // 0.50006711483001709
    0x1.5556f8p-3f,             // 0.16666978597640991
};

// kExp32Accurate: e^t = 1 + t q(t), |t| <= 1.02 ln2/16 = 0.044188133, q of degree 3
// c0 free: max relative error 2^-32.30 rounded, 2^-33.39 before rounding (chosen)
// c0 = 1: max relative error 2^-32.30 rounded, 2^-32.34 before rounding
constexpr float kExp32Accurate[4] = {
    0x1p+0f,                    // 1.0
    0x1p-1f,                    // 0.5
    0x1.555cb8p-3f,             // 0.16668075323104858
    0x1.55569ep-5f,             // 0.041667278856039047
};

// kExp32Table: bits of float(2^(j/8)), less those of 1 and j << 20: adding
// n << 20, n = 8 e + j, and the bits of 1 makes the bits of 2^e float(2^(j/8))
constexpr uint32_t kExp32Table[8] = {
    0x00000000u,
    0xfffb95c2u,
    0xfff837f0u,
    0xfff5fed7u,
    0xfff504f3u,
    0xfff5672au,
    0xfff744fdu,
    0xfffac0c7u,
};

// kExp32Delta: log(2^(j/8) / float(2^(j/8))), to be added to t
constexpr float kExp32Delta[8] = {
    0x0p+0f,                    // 0.0
    -0x1.9c0c22p-27f,           // -1.199215748926008e-8
    0x1.125002p-25f,            // 3.1934181521364735e-8
    -0x1.0a3552p-25f,           // -3.0990722876822474e-8
    0x1.26055cp-26f,            // 1.7114270889351246e-8
    0x1.67a1cap-28f,            // 5.2333342104304847e-9
    -0x1.f9c306p-27f,           // -1.4719605978541495e-8
    -0x1.a5217cp-28f,           // -6.128259677495862e-9
};

// Range reduction of exp: the nearest number and its remainder
constexpr float kLn2Over8Hi = 0x1.62e43p-4f;
constexpr float kLn2Over8Lo = -0x1.05c61p-32f;  // |hi + lo - exact| <= 2^-56.33
constexpr float k8Log2E = 0x1.715476p+3f;
constexpr double kLn2Hi = 0x1.62e42fefa39efp-1;
constexpr double kLn2Lo = 0x1.abc9e3b39803fp-56;  // |hi + lo - exact| <= 2^-110.43
constexpr double kLog2E = 0x1.71547652b82fep+0;

// kExp64: degree 9 would give 2^-51.46 rounded, 2^-51.46 before rounding
// kExp64: degree 11 would give 2^-63.70 rounded, 2^-63.84 before rounding
// kExp64: e^t = 1 + t q(t), |t| <= 1.01 ln2/2 = 0.35003933, q of degree 10
// c0 = 1: max relative error 2^-57.74 rounded, 2^-57.76 before rounding
constexpr double kExp64[11] = {
    0x1p+0,                     // 1.0
    0x1.000000000000bp-1,       // 0.50000000000000122
    0x1.5555555555504p-3,       // 0.16666666666666441
    0x1.555555555016ep-5,       // 0.041666666666517624
    0x1.11111111262d2p-7,       // 0.0083333333334833261
    0x1.6c16c185a8ceep-10,      // 0.0013888888947029515
    0x1.a01a0130e657cp-13,      // 0.00019841269525215286
    0x1.a01995f5c503dp-16,      // 2.4801489380513393e-5
    0x1.71df171bd2f32p-19,      // 2.7557570216103599e-6
    0x1.28b14e31034d6p-22,      // 2.7631651550246713e-7
    0x1.ad98a61c821dbp-26,      // 2.5005794867070474e-8
};

// kLog32: degree 0 is not enough, 2^-15.00 before rounding
// kLog32: degree 1 is not enough, 2^-22.70 before rounding
// kLog32: log(1 + f) = 2 s + s z P(z), s = f / (2 + f), z = s^2,
// 1 + f in [sqrt(1/2), sqrt(2)], 0 <= z <= 0.029437252, P of degree 2
// max relative error 2^-30.21 rounded, 2^-30.21 before rounding
constexpr float kLog32[3] = {
    0x1.55557ap-1f,             // 0.66666775941848755
    0x1.995ed8p-2f,             // 0.39977586269378662
    0x1.31e03ap-2f,             // 0.29870691895484924
};

// kLog64: degree 0 is not enough, 2^-15.00 before rounding
// kLog64: degree 1 is not enough, 2^-22.70 before rounding
// kLog64: degree 2 is not enough, 2^-30.21 before rounding
// kLog64: degree 3 is not enough, 2^-37.61 before rounding
// kLog64: degree 4 is not enough, 2^-44.94 before rounding
// kLog64: degree 5 is not enough, 2^-52.24 before rounding
// kLog64: log(1 + f) = 2 s + s z P(z), s = f / (2 + f), z = s^2,
// 1 + f in [sqrt(1/2), sqrt(2)], 0 <= z <= 0.029437252, P of degree 6
// max relative error 2^-59.50 rounded, 2^-59.50 before rounding
constexpr double kLog64[7] = {
    0x1.5555555555592p-1,       // 0.6666666666666734
    0x1.999999997ff63p-2,       // 0.39999999999417052
    0x1.24924941db48ap-2,       // 0.2857142874189057
    0x1.c71c521a19a11p-3,       // 0.22222198621894099
    0x1.74663ba33ee14p-3,       // 0.18183561889587507
    0x1.39a20ba65fb44p-3,       // 0.15314110852701834
    0x1.2f02516c4d141p-3,       // 0.14795364009627046
};

// log: hi is short, so that e * hi is exact for any exponent e
constexpr float kLogLn2FloatHi = 0x1.62ep-1f;
constexpr float kLogLn2FloatLo = 0x1.0bfbe8p-15f;  // |hi + lo - exact| <= 2^-39.14
constexpr double kLogLn2DoubleHi = 0x1.62e42feep-1;
constexpr double kLogLn2DoubleLo = 0x1.a39ef35793c76p-33;  // |hi + lo - exact| <= 2^-86.15

}  // namespace softmaxlib
