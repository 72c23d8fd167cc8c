use proptest::prelude::*;
use retouch::kernel::sets::{complement, difference, intersection, places, union};
use std::collections::BTreeSet;

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
        prop_assert_eq!(union(&x, &y), list(a.union(&b).copied()));
        prop_assert_eq!(intersection(&x, &y), list(a.intersection(&b).copied()));
        prop_assert_eq!(difference(&x, &y), list(a.difference(&b).copied()));
        let there = |v: &[i32], at: Vec<i32>| list(at.into_iter().map(|i| v[i as usize]));
        prop_assert_eq!(there(&x, places(&x, &y)), list(a.intersection(&b).copied()));
        prop_assert_eq!(there(&y, places(&y, &x)), list(a.intersection(&b).copied()));
        let all: BTreeSet<i32> = (0..60).collect();
        prop_assert_eq!(complement(&x, 60), list(all.difference(&a).copied()));
        let wide = |v: &[i32]| v.iter().map(|x| i64::from(*x)).collect::<Vec<_>>();
        prop_assert_eq!(union(&wide(&x), &wide(&y)), wide(&union(&x, &y)));
        prop_assert_eq!(complement(&wide(&x), 60), wide(&complement(&x, 60)));
    }
}

#[test]
fn complement_of_nothing_and_of_all() {
    assert_eq!(complement::<i32>(&[], 3), [0, 1, 2]);
    assert_eq!(complement(&[0i32, 1, 2], 3), [0i32; 0]);
    assert_eq!(complement::<i64>(&[], 0), [0i64; 0]);
}
