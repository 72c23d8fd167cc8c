use retouch::kernel::rng::{draw as draw_bits, philox, stream, uniform};

/// The known answers of Random123 for philox4x32-10.
#[test]
fn philox_known_answers() {
    let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
    let cases = [
        ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
        ([!0; 4], [!0; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
        (pi, [0xa409_3822, 0x299f_31d0], [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
    ];
    for (counter, key, want) in cases {
        assert_eq!(philox(counter, key), want);
    }
}

fn draw(threads: usize, seed: u64, stream: u64, n: usize) -> Vec<u32> {
    let mut out = vec![-1.0f32; n];
    uniform(threads, seed, stream, &mut out);
    out.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn a_number_depends_on_seed_stream_and_position_alone() {
    let n = 200_007;
    let all = draw(1, 7, 11, n);
    assert!(all == draw(2, 7, 11, n) && all == draw(3, 7, 11, n));
    for m in [0, 1, 3, 5, 17, 66_000] {
        assert!(draw(2, 7, 11, m) == all[..m]);
    }
    // The first block is the block of counter (0, 0, stream) under the key (seed).
    let words = philox([0, 0, 11, 0], [7, 0]);
    let want = words.map(|w| ((w >> 8) as f32 / 16_777_216.0).to_bits());
    assert_eq!(all[..4], want);
    let words = philox([50_001, 0, 11, 0], [7, 0]);
    assert_eq!(f32::from_bits(all[200_004]), (words[0] >> 8) as f32 / 16_777_216.0);
    for (seed, stream) in [(8, 11), (7, 12), (7 | 1 << 40, 11), (7, 11 | 1 << 40)] {
        let other = draw(1, seed, stream, n);
        let same = all.iter().zip(&other).filter(|(a, b)| a == b).count();
        assert!(same < 5, "{same} of {n} numbers are equal");
    }
}

#[test]
fn bits_are_the_numbers_below_a_share() {
    let n = 150_016; // several chunks of words
    let numbers: Vec<f32> = draw(1, 7, 1 << 35 | 11, n).into_iter().map(f32::from_bits).collect();
    let step = 1.0 / 16_777_216.0; // between neighbouring numbers
    let own = numbers[12_345]; // equal to the share is not below it
    for share in [0.0, -1.0, step, 1.5 * step, 0.2, 0.5, own, own + step, 1.0 - step, 1.0, 2.0] {
        let mut bits = vec![0xaa; n / 8];
        draw_bits(1, 7, 1 << 35 | 11, share, &mut bits);
        let set = |i: usize| bits[i / 8] >> (i % 8) & 1 == 1;
        assert!((0..n).all(|i| set(i) == (numbers[i] < share)), "{share}");
        let mut again = vec![0; n / 8];
        draw_bits(3, 7, 1 << 35 | 11, share, &mut again);
        assert!(bits == again);
    }
}

#[test]
fn numbers_are_uniform() {
    let n = 400_000;
    let all: Vec<f32> = draw(2, 0, 0, n).into_iter().map(f32::from_bits).collect();
    assert!(all.iter().all(|x| (0.0..1.0).contains(x)));
    let mut bins = [0usize; 64];
    all.iter().for_each(|x| bins[(x * 64.0) as usize] += 1);
    // Chi-square of 63 degrees of freedom: above 130 once in a million seeds.
    let want = n as f64 / 64.0;
    let chi: f64 = bins.iter().map(|b| (*b as f64 - want).powi(2) / want).sum();
    assert!(chi < 130.0, "chi-square {chi}");
}

#[test]
fn streams_of_names_are_fixed() {
    // FNV-1a, so that a mask is the same in every version.
    assert_eq!(stream(""), 0xcbf2_9ce4_8422_2325);
    assert_eq!(stream("a"), 0xaf63_dc4c_8601_ec8c);
    assert_ne!(stream("layer.1.weight"), stream("layer.2.weight"));
}
