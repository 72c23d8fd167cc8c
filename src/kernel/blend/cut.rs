//! The k-th largest magnitude of streams that are never stored: a sample brackets it, one pass counts what
//! is above and collects what is inside. Where the bracket missed or holds too much, a histogram finds it.
use super::{Cut, Scratch, Streams, TILE};
use crate::error::{Error, Result};
use crate::kernel::chunk::{CHUNK, install};
use crate::kernel::rank::{BINS, Bracket, Ranking, nth_best, walk};
use crate::kernel::wide::{Isa, Loop, WORD, wide};
use rayon::prelude::*;

/// How many of the largest magnitudes of a stream a cut parts from the rest.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    /// which stream
    pub stream: usize,
    /// how many
    pub k: usize,
    /// of equal magnitudes the last positions are among them, not the first: `last` is then the last equal
    /// that is *not*, as [`Stream::high`](super::Stream::high) takes it
    pub from_end: bool,
}

const RANKING: fn() -> Ranking<true> = || Ranking::new(true);
/// Rank of zero: the lowest there is.
const ZERO: u32 = 1 << 31;

/// For each request its cut, and how many exceed the bound. At most about `room` magnitudes are collected
/// at a time (4 bytes each, and as many again while lists grow); histograms find what needs more.
pub fn cuts(
    threads: usize,
    (name, names): (&str, &[&str]),
    streams: &Streams<'_>,
    requests: &[Request],
    room: Option<usize>,
) -> Result<Vec<(Cut, usize)>> {
    let len = streams.length()?;
    for r in requests {
        if r.k > len || r.stream >= streams.streams.len() {
            return Err(Error::Budget { k: r.k, eligible: len });
        }
    }
    // of each chunk: more means that the bracket is of no use; few distinct magnitudes (bf16) fill it
    let parts = len.div_ceil(CHUNK).max(1).saturating_mul(requests.len().max(1));
    let room = room.map_or(CHUNK / 4, |room| (room / parts).min(CHUNK / 4));
    let field = Field { streams, len, room };
    let found = install(threads, || field.find(requests));
    found.ok_or_else(|| streams.not_a_number(name, names, len))
}

struct Field<'a> {
    streams: &'a Streams<'a>,
    len: usize,
    /// magnitudes that are collected of one chunk
    room: usize,
}

/// What the pass over one chunk found for one request.
#[derive(Default, Clone)]
struct Found {
    above: usize,
    within: usize,
    nan: bool,
    ranks: Vec<u32>,
}

/// Where the sample looks: stretches of neighbours that come in one cache line.
const STOPS: usize = 1 << 13;
const NEIGHBOURS: usize = 16;
/// Half the width of a bracket in standard deviations of independent draws; neighbours are not quite.
const DEVIATIONS: f64 = 8.0;

impl Field<'_> {
    fn find(&self, requests: &[Request]) -> Option<Vec<(Cut, usize)>> {
        let mut brackets: Vec<Bracket> = requests.par_iter().map(|r| self.bracket(r)).collect();
        let mut found = self.survey(requests, &brackets);
        if found.iter().flatten().any(|f| f.nan) {
            return None;
        }
        let missed: Vec<usize> = (0..requests.len())
            .filter(|&r| !encloses(found.iter().map(|f| &f[r]), brackets[r], requests[r].k))
            .collect();
        if !missed.is_empty() {
            let again: Vec<Request> = missed.iter().map(|&r| requests[r]).collect();
            let exact: Vec<Bracket> =
                again.iter().map(|r| Bracket::of(self.kth(r.stream, r.k))).collect();
            for (found, new) in found.iter_mut().zip(self.survey(&again, &exact)) {
                missed.iter().zip(new).for_each(|(&r, f)| found[r] = f);
            }
            missed.iter().zip(&exact).for_each(|(&r, b)| brackets[r] = *b);
        }
        let cut = |r: usize| self.cut(&requests[r], brackets[r], &found, r);
        Some((0..requests.len()).map(cut).collect())
    }

    fn bracket(&self, request: &Request) -> Bracket {
        let stops = STOPS.min(self.len / 1024);
        if stops < 64 || request.k == 0 {
            return Bracket { floor: 0, ceiling: u32::MAX };
        }
        let step = self.len / stops;
        let (mut ranks, mut at) = (Vec::with_capacity(stops * NEIGHBOURS), step / 2);
        let (mut base, mut d) = ([0.0; NEIGHBOURS], [0.0; NEIGHBOURS]);
        for _ in 0..stops {
            let n = NEIGHBOURS.min(self.len - at);
            self.streams.base(at, &mut base[..n]);
            self.streams.raw(request.stream, at, &base[..n], &mut d[..n]);
            ranks.extend(d[..n].iter().map(|x| RANKING().rank(*x)));
            at += step;
        }
        let m = ranks.len() as f64;
        let share = request.k as f64 / self.len as f64;
        let slack = DEVIATIONS * (share * (1.0 - share) * m).sqrt() + 2.0;
        let (low, high) = ((share * m + slack).ceil(), (share * m - slack).floor());
        let (mut floor, mut ceiling, mut best) = (0, u32::MAX, ranks.as_mut_slice());
        if low < m {
            floor = nth_best(best, low as usize).saturating_sub(1);
            let at = best.len() - low as usize;
            best = &mut best[at..];
        }
        if high >= 1.0 {
            ceiling = nth_best(best, high as usize);
        }
        Bracket { floor, ceiling }
    }

    /// For each chunk what it holds for each request.
    fn survey(&self, requests: &[Request], brackets: &[Bracket]) -> Vec<Vec<Found>> {
        let room = self.room;
        let one = |i: usize| {
            let first = i * CHUNK;
            let len = CHUNK.min(self.len - first);
            wide(Survey { streams: self.streams, requests, brackets, first, len, room })
        };
        (0..self.len.div_ceil(CHUNK)).into_par_iter().map(one).collect()
    }

    /// The k-th best rank by a histogram of the upper, then of the lower halves.
    fn kth(&self, stream: usize, k: usize) -> u32 {
        let upper = self.histogram(stream, |rank| Some(rank >> 16));
        let (high, rest) = walk(&upper, k);
        let lower = self.histogram(stream, |rank| (rank >> 16 == high).then_some(rank & 0xffff));
        high << 16 | walk(&lower, rest).0
    }

    fn histogram(&self, stream: usize, bin: impl Fn(u32) -> Option<u32> + Sync) -> Vec<u64> {
        let chunks: Vec<usize> = (0..self.len.div_ceil(CHUNK)).collect();
        let fill = |mut bins: Vec<u64>, run: &[usize]| {
            let mut scratch = Scratch::new(1);
            for i in run {
                let end = self.len.min((i + 1) * CHUNK);
                for at in (i * CHUNK..end).step_by(TILE) {
                    let n = TILE.min(end - at);
                    let (base, d) = (&mut scratch.base[..n], &mut scratch.tiles[0][..n]);
                    self.streams.base(at, base);
                    self.streams.raw(stream, at, base, d);
                    for bin in d.iter().filter_map(|x| bin(RANKING().rank(*x))) {
                        bins[bin as usize] += 1;
                    }
                }
            }
            bins
        };
        let merge = |mut a: Vec<u64>, b: Vec<u64>| {
            a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
            a
        };
        chunks.par_chunks(16).fold(|| vec![0; BINS], fill).reduce(|| vec![0; BINS], merge)
    }

    fn cut(
        &self,
        request: &Request,
        bracket: Bracket,
        found: &[Vec<Found>],
        r: usize,
    ) -> (Cut, usize) {
        if request.k == 0 {
            let last = if request.from_end { i64::MAX } else { -1 };
            return (Cut { bound: f32::INFINITY, last }, 0);
        }
        let above: usize = found.iter().map(|f| f[r].above).sum();
        let bound = if bracket.is_one() {
            bracket.ceiling
        } else {
            let mut all: Vec<u32> = found.iter().flat_map(|f| f[r].ranks.iter().copied()).collect();
            nth_best(&mut all, request.k - above)
        };
        let equal = |f: &Found| match bracket.is_one() {
            true => f.within,
            false => f.ranks.iter().filter(|x| **x == bound).count(),
        };
        let more = |f: &Found| match bracket.is_one() {
            true => 0,
            false => f.ranks.iter().filter(|x| **x > bound).count(),
        };
        let above = above + found.iter().map(|f| more(&f[r])).sum::<usize>();
        let mut inside = request.k - above;
        if request.from_end {
            // the first ones stay outside: their last position is what the cut names
            inside = found.iter().map(|f| equal(&f[r])).sum::<usize>() - inside;
        }
        let value = f32::from_bits(bound ^ ZERO);
        if inside == 0 {
            return (Cut { bound: value, last: -1 }, above);
        }
        for (i, f) in found.iter().enumerate() {
            let here = equal(&f[r]);
            if inside <= here {
                let last = self.nth_equal(request.stream, i, value, inside);
                let last = (self.streams.start + last) as i64;
                return (Cut { bound: value, last }, above);
            }
            inside -= here;
        }
        (Cut { bound: value, last: i64::MAX }, above)
    }

    /// Position of the n-th element of a chunk whose magnitude is `value`.
    fn nth_equal(&self, stream: usize, chunk: usize, value: f32, mut n: usize) -> usize {
        let mut scratch = Scratch::new(1);
        let end = self.len.min((chunk + 1) * CHUNK);
        for at in (chunk * CHUNK..end).step_by(TILE) {
            let size = TILE.min(end - at);
            let (base, d) = (&mut scratch.base[..size], &mut scratch.tiles[0][..size]);
            self.streams.base(at, base);
            self.streams.raw(stream, at, base, d);
            for (i, x) in d.iter().enumerate() {
                n -= usize::from(x.abs() == value);
                if n == 0 {
                    return at + i;
                }
            }
        }
        end - 1
    }
}

fn encloses<'a>(
    found: impl Iterator<Item = &'a Found> + Clone,
    bracket: Bracket,
    k: usize,
) -> bool {
    let above: usize = found.clone().map(|f| f.above).sum();
    let within: usize = found.clone().map(|f| f.within).sum();
    let known = bracket.is_one() || within == found.map(|f| f.ranks.len()).sum::<usize>();
    k == 0 || (known && above < k && k <= above + within)
}

struct Survey<'a> {
    streams: &'a Streams<'a>,
    requests: &'a [Request],
    brackets: &'a [Bracket],
    first: usize,
    len: usize,
    room: usize,
}

impl Loop for Survey<'_> {
    type Output = Vec<Found>;
    #[inline(always)]
    fn run(self, isa: impl Isa) -> Vec<Found> {
        let Survey { streams, requests, brackets, first, len, room } = self;
        let mut all = vec![Found::default(); requests.len()];
        let mut scratch = Scratch::new(1);
        for at in (first..first + len).step_by(TILE) {
            let n = TILE.min(first + len - at);
            let (base, d) = (&mut scratch.base[..n], &mut scratch.tiles[0][..n]);
            streams.base(at, base);
            for t in 0..streams.streams.len() {
                if !requests.iter().any(|r| r.stream == t) {
                    continue;
                }
                let nan = streams.raw(t, at, base, d);
                for ((request, bracket), found) in requests.iter().zip(brackets).zip(&mut all) {
                    if request.stream != t {
                        continue;
                    }
                    found.nan |= nan;
                    let collect = !bracket.is_one() && found.ranks.len() <= room;
                    let (blocks, tail) = d.as_chunks::<WORD>();
                    for block in blocks {
                        let ranks: [u32; WORD] = std::array::from_fn(|j| RANKING().rank(block[j]));
                        let above = isa.above(&ranks, bracket.ceiling);
                        let inside = isa.above(&ranks, bracket.floor) & !above;
                        found.above += above.count_ones() as usize;
                        found.within += inside.count_ones() as usize;
                        if collect {
                            let mut rest = inside;
                            while rest != 0 {
                                found.ranks.push(ranks[rest.trailing_zeros() as usize]);
                                rest &= rest - 1;
                            }
                        }
                    }
                    for x in tail {
                        let rank = RANKING().rank(*x);
                        found.above += usize::from(rank > bracket.ceiling);
                        if rank > bracket.floor && rank <= bracket.ceiling {
                            found.within += 1;
                            if collect {
                                found.ranks.push(rank);
                            }
                        }
                    }
                }
            }
        }
        all
    }
}
