use proptest::prelude::*;
use retouch::kernel::exchange::exchange;
use retouch::kernel::sets::{carry, complement, difference, intersection, places, union};
use std::collections::{BTreeMap, BTreeSet};

fn list(s: impl IntoIterator<Item = i32>) -> Vec<i32> {
    s.into_iter().collect()
}

proptest! {
    #[test]
    fn algebra_of_sets(
        a in prop::collection::btree_set(0i32..60, 0..60),
        b in prop::collection::btree_set(0i32..60, 0..60),
    ) {
        let (x, y) = (list(a.clone()), list(b.clone()));
        prop_assert_eq!(union(2, &x, &y), list(a.union(&b).copied()));
        prop_assert_eq!(intersection(2, &x, &y), list(a.intersection(&b).copied()));
        prop_assert_eq!(difference(2, &x, &y), list(a.difference(&b).copied()));
        let there = |v: &[i32], at: Vec<i32>| list(at.into_iter().map(|i| v[i as usize]));
        prop_assert_eq!(there(&x, places(2, &x, &y)), list(a.intersection(&b).copied()));
        prop_assert_eq!(there(&y, places(2, &y, &x)), list(a.intersection(&b).copied()));
        let all: BTreeSet<i32> = (0..60).collect();
        prop_assert_eq!(complement(&x, 60), list(all.difference(&a).copied()));
        let wide = |v: &[i32]| v.iter().map(|x| i64::from(*x)).collect::<Vec<_>>();
        prop_assert_eq!(union(2, &wide(&x), &wide(&y)), wide(&union(2, &x, &y)));
        prop_assert_eq!(complement(&wide(&x), 60), wide(&complement(&x, 60)));
    }
}

#[test]
fn complement_of_nothing_and_of_all() {
    assert_eq!(complement::<i32>(&[], 3), [0, 1, 2]);
    assert_eq!(complement(&[0i32, 1, 2], 3), [0i32; 0]);
    assert_eq!(complement::<i64>(&[], 0), [0i64; 0]);
}

/// Long lists of every kind: dense, sparse, far apart, of one side alone.
fn long() -> Vec<Vec<i32>> {
    let every = |step: i32, from: i32, to: i32| (from..to).step_by(step as usize).collect();
    let hashed = |share: u32, to: i32| {
        (0..to).filter(|i| (*i as u32).wrapping_mul(2_654_435_761) >> 16 & 1023 < share).collect()
    };
    let ends = [every(1, 0, 9000), every(7, i32::MAX - 70_000, i32::MAX)].concat();
    vec![
        every(1, 0, 20_000),
        every(3, 5, 100_000),
        hashed(300, 80_000),
        hashed(700, 70_000),
        every(20_011, 0, 20_000_000),
        ends,
        vec![],
        vec![65_535, 65_536],
    ]
}

#[test]
fn long_lists_are_as_short_ones() {
    for x in long() {
        for y in long() {
            let (a, b): (BTreeSet<i32>, BTreeSet<i32>) =
                (x.iter().copied().collect(), y.iter().copied().collect());
            for threads in [1, 2] {
                assert!(union(threads, &x, &y) == list(a.union(&b).copied()));
                assert!(intersection(threads, &x, &y) == list(a.intersection(&b).copied()));
                assert!(difference(threads, &x, &y) == list(a.difference(&b).copied()));
                let there = places(threads, &x, &y).into_iter().map(|i| x[i as usize]);
                assert!(list(there) == list(a.intersection(&b).copied()));
            }
        }
    }
}

#[test]
fn carrying_is_by_position() {
    for old in long() {
        for new in long() {
            let from: Vec<f32> = old.iter().map(|p| f32::from_bits(*p as u32)).collect();
            let twice: Vec<f32> = from.iter().map(|x| f32::from_bits(!x.to_bits())).collect();
            let has: BTreeSet<i32> = old.iter().copied().collect();
            let (mut a, mut b) = (vec![-1.5f32; new.len()], vec![-2.5f32; new.len()]);
            let pairs = vec![(&from[..], &mut a[..]), (&twice[..], &mut b[..])];
            carry(2, "w", &old, &new, pairs).unwrap();
            for ((p, a), b) in new.iter().zip(a).zip(b) {
                let found = has.contains(p);
                let want = if found { *p as u32 } else { (-1.5f32).to_bits() };
                assert_eq!(a.to_bits(), want, "{p}");
                let want = if found { !*p as u32 } else { (-2.5f32).to_bits() };
                assert_eq!(b.to_bits(), want, "{p}");
            }
        }
    }
}

#[test]
fn carrying_checks_first() {
    let (from, mut to) = ([1.0f32, 2.0], [0.0f32, 0.0]);
    assert!(carry(1, "w", &[0i32, 1], &[1], vec![(&from[..], &mut to[..])]).is_err());
    assert!(carry(1, "w", &[0i32], &[1, 2], vec![(&from[..], &mut to[..])]).is_err());
    assert!(carry(1, "w", &[1i32, 0], &[1, 2], vec![(&from[..], &mut to[..])]).is_err());
    assert!(carry(1, "w", &[-1i32, 0], &[1, 2], vec![(&from[..], &mut to[..])]).is_err());
    assert_eq!(to, [0.0, 0.0]);
}

#[test]
fn exchanging_is_by_position() {
    let n = 110_000;
    let first = |p: i32| p as f32 * 0.5; // what a position held at first; every third has moved
    let tensor: Vec<f32> = (0..n).map(|p| first(p) + if p % 3 == 0 { 1.0 } else { 0.0 }).collect();
    let inside: Vec<Vec<i32>> = long()
        .into_iter()
        .skip(1)
        .step_by(2)
        .chain([vec![]])
        .map(|x| x.into_iter().filter(|p| *p < n).collect())
        .collect();
    let of = |x: &[i32], sign: f32| x.iter().map(|p| sign * first(*p)).collect::<Vec<f32>>();
    for old in &inside {
        for new in &inside {
            for aside in &inside {
                let aside = difference(1, aside, old);
                let (now, then) = (BTreeSet::from_iter(new), BTreeSet::from_iter(old));
                let mut want: BTreeMap<i32, f32> = aside.iter().map(|p| (*p, -first(*p))).collect();
                let held: Vec<f32> = new.iter().map(|p| *want.get(p).unwrap_or(&9.5)).collect();
                want.extend(old.iter().filter(|p| *p % 3 == 0).map(|p| (*p, first(*p))));
                want.retain(|p, _| !now.contains(p));
                let mut values = vec![9.5; new.len()];
                let (a, b) = (of(&aside, -1.0), of(old, 1.0));
                let (a, b, c) =
                    ((&aside[..], &a[..]), (&old[..], &b[..]), (&new[..], &mut values[..]));
                let found = exchange(2, "w", &tensor, a, b, c).unwrap();
                assert!(values == held);
                assert!(found.index == list(want.keys().copied()));
                assert!(found.values == want.values().copied().collect::<Vec<_>>());
                assert_eq!(found.shared, now.intersection(&then).count());
            }
        }
    }
}

#[test]
fn exchanging_checks_first() {
    let (tensor, mut to) = ([0.0f32; 4], [1.0f32]);
    let none = (&[][..], &[][..]);
    let mut go = |old: &[i32], values: &[f32], new: &[i32]| {
        exchange(1, "w", &tensor, none, (old, values), (new, &mut to[..])).is_err()
    };
    assert!(go(&[4], &[0.0], &[0]) && go(&[1], &[], &[0]) && go(&[1], &[0.0], &[-1]));
    assert!(go(&[1, 1], &[0.0; 2], &[0]) && go(&[1], &[0.0], &[0, 1]) && go(&[], &[], &[9]));
    assert!(!go(&[3], &[0.0], &[3]));
}
