use half::{bf16, f16};
use retouch::num::Element;

#[test]
fn f16_widens_exactly() {
    for bits in 0..=u16::MAX {
        let x = f16::from_bits(bits);
        let (got, want) = (Element::to_f32(x), x.to_f32());
        assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{bits:#x}");
        assert!(x.is_nan() || f16::from_bits(bits) == <f16 as Element>::from_f32(got));
        assert_eq!(Element::is_nan(x), want.is_nan());
    }
}

/// Around every f16 value and every middle between two: the places where rounding turns.
#[test]
fn f16_narrows_to_nearest_even() {
    for bits in 0..0x7c00u16 {
        let (a, b) = (f16::from_bits(bits).to_f32(), f16::from_bits(bits + 1).to_f32());
        let b = if b.is_infinite() { 65536.0 } else { b };
        for x in [a, (a + b) / 2.0, b] {
            for x in [x.next_down(), x, x.next_up()] {
                for x in [x, -x] {
                    let got = <f16 as Element>::from_f32(x);
                    assert_eq!(got.to_bits(), f16::from_f32(x).to_bits(), "{x:e}");
                }
            }
        }
    }
    for x in [f32::INFINITY, -f32::INFINITY, 1e30, f32::MAX, 1e-40, -0.0, f32::from_bits(1)] {
        assert_eq!(<f16 as Element>::from_f32(x).to_bits(), f16::from_f32(x).to_bits());
    }
    assert!(<f16 as Element>::from_f32(f32::NAN).is_nan());
    assert!(<f16 as Element>::from_f32(f32::from_bits(0xff80_0001)).is_nan());
}

#[test]
fn keys_are_in_the_order_of_values() {
    fn check<T: Element>(all: impl Iterator<Item = T>) {
        let mut all: Vec<T> = all.filter(|x| !x.is_nan()).collect();
        all.sort_by_key(|x| x.key());
        assert!(all.windows(2).all(|w| w[0].to_f32() <= w[1].to_f32()));
        assert!(
            all.windows(2).all(|w| (w[0].key() == w[1].key()) == (w[0].to_f32() == w[1].to_f32()))
        );
        all.sort_by_key(|x| x.key_abs());
        assert!(all.windows(2).all(|w| w[0].to_f32().abs() <= w[1].to_f32().abs()));
        assert!(all.iter().all(|x| x.key_abs() <= T::INFINITY_KEY));
    }
    check((0..=u16::MAX).map(f16::from_bits));
    check((0..=u16::MAX).map(bf16::from_bits));
    check((0..=u32::MAX).step_by(65_521).map(f32::from_bits));
}
