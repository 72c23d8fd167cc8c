//! What is put aside of a tensor while a selection of it moves on.
//!
//! Beside the selected positions of a tensor stands what each held at first. That of positions which are
//! selected no longer, and hold something else by now, is put aside; that of positions which are selected
//! again comes back. All in one pass, a span of positions at a time.
use super::chunk::{check_len, install};
use super::sets::{SPAN, Span, ascending, cut, spans};
use crate::error::Result;
use crate::num::{Element, Position};
use crate::view::check_index;
use rayon::prelude::*;

/// What is put aside after an exchange.
#[derive(Debug)]
pub struct Aside<P, T> {
    /// ascending
    pub index: Vec<P>,
    /// one for each
    pub values: Vec<T>,
    /// how many positions are selected before and after
    pub shared: usize,
}

/// `aside`, `old` and `new` are ascending positions with a value for each: what is put aside, what was
/// selected, what is selected now. Positions of `old` that `new` lacks, and where `tensor` holds other bits
/// than the value, are put aside; positions of `new` that `aside` has receive that value and leave it.
pub fn exchange<P: Position, T: Element>(
    threads: usize,
    name: &str,
    tensor: &[T],
    aside: (&[P], &[T]),
    old: (&[P], &[T]),
    new: (&[P], &mut [T]),
) -> Result<Aside<P, T>> {
    let lists = [aside.0, old.0, new.0];
    for (index, values) in lists.iter().zip([aside.1.len(), old.1.len(), new.1.len()]) {
        check_len(name, values, index.len())?;
        if !ascending(index) || index.last().is_some_and(|p| p.at() >= tensor.len()) {
            check_index(name, index, tensor.len())?; // says what is wrong
        }
    }
    let spans = spans(lists);
    let counts: Vec<usize> = spans.iter().map(|s| s.of[2].len()).collect();
    Ok(install(threads, || {
        let work = spans.par_iter().zip(cut(new.1, &counts));
        let pieces: Vec<Aside<P, T>> = work
            .map_init(Room::default, |room, (s, to)| {
                let of = |n: usize| s.of[n].clone();
                room.mark(s, &new.0[of(2)]);
                room.give_back(s, &aside.0[of(0)], &aside.1[of(0)], to);
                let shared = room.leave(s, &old.0[of(1)], &old.1[of(1)], tensor);
                room.clear(s, &new.0[of(2)]);
                let (index, values) = merge(&room.kept, &room.left);
                Aside { index, values, shared }
            })
            .collect();
        let sizes: Vec<usize> = pieces.iter().map(|p| p.index.len()).collect();
        let total = sizes.iter().sum();
        let (mut index, mut values) = (vec![P::new(0); total], vec![T::default(); total]);
        let to = cut(&mut index, &sizes).into_par_iter().zip(cut(&mut values, &sizes));
        to.zip(&pieces).for_each(|((index, values), piece)| {
            index.copy_from_slice(&piece.index);
            values.copy_from_slice(&piece.values);
        });
        Aside { index, values, shared: pieces.iter().map(|p| p.shared).sum() }
    }))
}

/// Tables of one span at a time, kept for the next one.
struct Room<P, T> {
    /// 1 + the place in `new` of each position of the span, 0 where it has none
    places: Vec<u32>,
    back: Vec<(u32, T)>,
    kept: Vec<(P, T)>,
    left: Vec<(P, T)>,
}

impl<P, T> Default for Room<P, T> {
    fn default() -> Self {
        Room { places: vec![0; SPAN], back: Vec::new(), kept: Vec::new(), left: Vec::new() }
    }
}

impl<P: Position, T: Element> Room<P, T> {
    fn mark(&mut self, s: &Span<3>, new: &[P]) {
        for (j, x) in (1..).zip(new) {
            self.places[x.at() - s.first] = j;
        }
    }

    fn clear(&mut self, s: &Span<3>, new: &[P]) {
        new.iter().for_each(|x| self.places[x.at() - s.first] = 0);
    }

    // Below, entries are written whether they stay or not: that cannot be predicted.

    fn give_back(&mut self, s: &Span<3>, index: &[P], values: &[T], to: &mut [T]) {
        self.kept.resize(index.len() + 1, (P::new(0), T::default()));
        self.back.resize(index.len() + 1, (0, T::default()));
        let (mut n, mut m) = (0, 0);
        for (x, value) in index.iter().zip(values) {
            let place = self.places[x.at() - s.first];
            self.kept[n] = (*x, *value);
            self.back[m] = (place.wrapping_sub(1), *value);
            n += usize::from(place == 0);
            m += usize::from(place != 0);
        }
        self.kept.truncate(n);
        self.back[..m].iter().for_each(|(j, value)| to[*j as usize] = *value);
    }

    /// Returns how many of `index` stay.
    fn leave(&mut self, s: &Span<3>, index: &[P], values: &[T], tensor: &[T]) -> usize {
        self.left.resize(index.len() + 1, (P::new(0), T::default()));
        let (mut n, mut shared) = (0, 0);
        for (x, value) in index.iter().zip(values) {
            let stays = self.places[x.at() - s.first] != 0;
            let moved = tensor[x.at()].bits() != value.bits();
            self.left[n] = (*x, *value);
            n += usize::from(!stays & moved);
            shared += usize::from(stays);
        }
        self.left.truncate(n);
        shared
    }
}

/// Both in order; of what both have that of `b`.
fn merge<P: Position, T: Element>(a: &[(P, T)], b: &[(P, T)]) -> (Vec<P>, Vec<T>) {
    let most = a.len() + b.len();
    let (mut index, mut values) = (Vec::with_capacity(most), Vec::with_capacity(most));
    let (mut i, mut j) = (0, 0);
    while i < a.len() && j < b.len() {
        let ((x, v), (y, w)) = (a[i], b[j]);
        index.push(x.min(y));
        values.push(if y <= x { w } else { v });
        i += usize::from(x <= y);
        j += usize::from(y <= x);
    }
    for (x, v) in a[i..].iter().chain(&b[j..]) {
        index.push(*x);
        values.push(*v);
    }
    (index, values)
}
