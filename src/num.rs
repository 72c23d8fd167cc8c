//! Element types: loaded wide, computed in f32, stored with one rounding (nearest, ties to even).
use half::{bf16, f16};

/// A float that a weight, a gradient or a score can be stored in.
pub trait Element: Copy + Default + PartialEq + Send + Sync + 'static {
    /// The name that torch gives it, without `torch.`.
    const NAME: &'static str;
    /// Its value as f32 (exact for f16 and bf16; rounded once for f64).
    fn to_f32(self) -> f32;
    /// The nearest value to `x`, ties to even.
    fn from_f32(x: f32) -> Self;
    /// Its bits, zero-extended.
    fn bits(self) -> u64;
    /// A number whose unsigned order is the order of the values: -inf lowest, then finite values with
    /// -0 equal to +0, +inf highest. NaN must be refused before.
    fn key(self) -> u32;
    /// The same for magnitudes: -x and x have one key.
    fn key_abs(self) -> u32;
    /// `key_abs` of infinity; that of NaN is above.
    const INFINITY_KEY: u32;
    /// Whether it is not a number.
    #[inline(always)]
    fn is_nan(self) -> bool {
        self.key_abs() > Self::INFINITY_KEY
    }
}

/// Unsigned order of a signed IEEE 754 pattern of 32 bits; -0 becomes +0.
#[inline(always)]
fn order(bits: u32) -> u32 {
    let bits = if bits == 0x8000_0000 { 0 } else { bits };
    if bits >> 31 == 1 { !bits } else { bits | 0x8000_0000 }
}

impl Element for f32 {
    const NAME: &'static str = "float32";
    const INFINITY_KEY: u32 = f32::INFINITY.to_bits();
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn bits(self) -> u64 {
        u64::from(self.to_bits())
    }
    #[inline(always)]
    fn key(self) -> u32 {
        order(self.to_bits())
    }
    #[inline(always)]
    fn key_abs(self) -> u32 {
        self.to_bits() & 0x7fff_ffff
    }
}

macro_rules! half_element {
    ($t:ty, $name:literal) => {
        impl Element for $t {
            const NAME: &'static str = $name;
            const INFINITY_KEY: u32 = <$t>::INFINITY.to_bits() as u32;
            #[inline(always)]
            fn to_f32(self) -> f32 {
                <$t>::to_f32(self)
            }
            #[inline(always)]
            fn from_f32(x: f32) -> Self {
                <$t>::from_f32(x)
            }
            #[inline(always)]
            fn bits(self) -> u64 {
                u64::from(self.to_bits())
            }
            #[inline(always)]
            fn key(self) -> u32 {
                order(u32::from(self.to_bits()) << 16)
            }
            #[inline(always)]
            fn key_abs(self) -> u32 {
                u32::from(self.to_bits() & 0x7fff)
            }
        }
    };
}
half_element!(f16, "float16");
half_element!(bf16, "bfloat16");

/// A position in a flat tensor: i32 below 2^31 elements, i64 from there on (what torch can store).
pub trait Position: Copy + Ord + Send + Sync + 'static {
    /// As an offset. Negative positions must be refused before.
    fn at(self) -> usize;
    /// From an offset that fits.
    fn new(at: usize) -> Self;
}
impl Position for i32 {
    #[inline(always)]
    fn at(self) -> usize {
        self as usize
    }
    #[inline(always)]
    fn new(at: usize) -> Self {
        at as i32
    }
}
impl Position for i64 {
    #[inline(always)]
    fn at(self) -> usize {
        self as usize
    }
    #[inline(always)]
    fn new(at: usize) -> Self {
        at as i64
    }
}
