//! AdamW with decoupled weight decay (Loshchilov & Hutter, 2019) on compact values:
//!
//! ```text
//! x ← x (1 − lr·wd)      m ← m + (1 − β1)(g − m)      v ← β2 v + (1 − β2) g²
//! x ← x − lr / (1 − β1ᵗ) · m / (√v / √(1 − β2ᵗ) + ε)
//! ```
//!
//! in the order and with the roundings of `torch.optim.AdamW` (single tensor) on a processor with
//! fused multiply-add. Only the square root may differ: it is correctly rounded here, torch's vector
//! library errs by up to one unit in the last place.
//!
//! `t` is either one number or one for each coordinate, which then has the bias correction of its own age.
//! A gate closes some coordinates for one step; what becomes of their moments is a choice.
use super::chunk::{CHUNK, Divide, check_len, each};
use super::gather::{GRAIN, Target};
use super::lowbit::{Both, Codes};
use super::wide::{Isa, Loop, wide};
use crate::error::{Error, Result};
use crate::num::{Element, Position};

/// Hyperparameters, as Python gives them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// learning rate
    pub lr: f64,
    /// decay of the mean of gradients
    pub beta1: f64,
    /// decay of the mean of squares
    pub beta2: f64,
    /// added to the denominator
    pub eps: f64,
    /// decoupled weight decay
    pub weight_decay: f64,
    /// ascend instead of descend
    pub maximize: bool,
    /// the step is multiplied by it, the decay is not
    pub scale: f64,
}

/// What becomes of a closed coordinate. Its value stays, but for decay where that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    /// its moments and its clock go on
    Updated {
        /// whether it decays
        decay: bool,
    },
    /// its moments and its clock stand still
    Frozen,
    /// its moments and its clock start again from nothing
    Reset,
}

/// Which coordinates move in this step: those that are not 0.
pub type Gate<'a> = (&'a [u8], Closed);

/// How many steps the coordinates have taken.
#[derive(Debug)]
pub enum Clock<'a> {
    /// This step is the t-th of all of them (from 1).
    Shared(u64),
    /// Steps of each before this one; it is counted here.
    Each(&'a mut [i32]),
}

/// What one step multiplies by: computed in f64 and rounded once, as torch does with Python floats.
#[derive(Clone, Copy)]
struct Factors {
    decay: f32,
    lerp: f32,
    beta2: f32,
    one_minus_beta2: f32,
    eps: f32,
    sign: f32,
}

/// What depends on the age of a coordinate.
#[derive(Clone, Copy, Default)]
struct Bias {
    root_bias2: f32,
    minus_step: f32,
}

impl Bias {
    fn new(cfg: &AdamW, t: f64) -> Self {
        let (bias1, bias2) = (1.0 - cfg.beta1.powf(t), 1.0 - cfg.beta2.powf(t));
        Bias { root_bias2: bias2.sqrt() as f32, minus_step: -(cfg.lr / bias1 * cfg.scale) as f32 }
    }
}

impl Factors {
    fn new(cfg: &AdamW) -> Self {
        Factors {
            decay: (1.0 - cfg.lr * cfg.weight_decay) as f32,
            lerp: (1.0 - cfg.beta1) as f32,
            beta2: cfg.beta2 as f32,
            one_minus_beta2: (1.0 - cfg.beta2) as f32,
            eps: cfg.eps as f32,
            sign: if cfg.maximize { -1.0 } else { 1.0 },
        }
    }

    /// One coordinate: the new value, m and v.
    #[inline(always)]
    fn update(&self, bias: Bias, x: f32, g: f32, m: f32, v: f32) -> (f32, f32, f32) {
        let g = g * self.sign;
        let toward = g - m;
        // torch's lerp starts from the nearer end.
        let m = if self.lerp < 0.5 {
            self.lerp.mul_add(toward, m)
        } else {
            (self.lerp - 1.0).mul_add(toward, g)
        };
        let v = (self.one_minus_beta2 * g).mul_add(g, v * self.beta2);
        let denominator = v.sqrt() / bias.root_bias2 + self.eps;
        (x * self.decay + bias.minus_step * m / denominator, m, v)
    }
}

/// So many ages are worked out sooner than it is found out which of them occur.
const FEW_AGES: usize = 1 << 10;

/// The bias corrections of one step.
enum Biases {
    /// All coordinates have one age.
    One(Bias),
    /// By age, counted from `first`; of many only those that occur are filled in.
    Table { first: i32, table: Vec<Bias> },
    /// Ages lie further apart than a table should be long: each is worked out where it is met.
    Direct(AdamW),
}

impl Biases {
    /// Of ages that have not been counted up yet.
    fn of(cfg: &AdamW, ages: &[i32]) -> Result<Self> {
        let (mut first, mut last) = (i32::MAX, 0);
        for age in ages {
            (first, last) = (first.min(*age), last.max(*age));
        }
        if ages.is_empty() {
            return Ok(Biases::One(Bias::default()));
        }
        if first < 0 || last == i32::MAX {
            return Err(Error::Value {
                name: "step".to_string(),
                rule: "from 0 to 2147483646 for each coordinate".to_string(),
                got: if first < 0 { first } else { last }.to_string(),
            });
        }
        let bias = |age: i32| Bias::new(cfg, f64::from(age) + 1.0);
        if first == last {
            return Ok(Biases::One(bias(first)));
        }
        let span = (last - first) as usize + 1;
        if span > ages.len().max(CHUNK) {
            return Ok(Biases::Direct(*cfg));
        }
        let few = span <= FEW_AGES;
        let mut occurs = vec![few; span];
        for age in if few { &[][..] } else { ages } {
            occurs[(age - first) as usize] = true;
        }
        let table = (first..).zip(occurs).map(|(a, o)| if o { bias(a) } else { Bias::default() });
        Ok(Biases::Table { first: first + 1, table: table.collect() })
    }

    /// Of a coordinate whose `age`-th step this is.
    #[inline(always)]
    fn at(&self, age: i32) -> Bias {
        match self {
            Biases::One(bias) => *bias,
            Biases::Table { first, table } => table[(age - first) as usize],
            Biases::Direct(cfg) => Bias::new(cfg, f64::from(age)),
        }
    }
}

/// One step of these values. `value` holds the f32 master values; `target` is the weight and the
/// positions in it that receive them, rounded once. Without a `gate` all coordinates move.
#[allow(clippy::too_many_arguments)]
pub fn step<T: Element, P: Position>(
    threads: usize,
    cfg: &AdamW,
    clock: Clock<'_>,
    gate: Option<Gate<'_>>,
    value: &mut [f32],
    grad: &[f32],
    m: &mut [f32],
    v: &mut [f32],
    target: Option<(&str, &mut [T], &[P])>,
) -> Result<()> {
    check_len("exp_avg", m.len(), value.len())?;
    check_len("exp_avg_sq", v.len(), value.len())?;
    run(threads, cfg, clock, gate, value, grad, Moments::Wide(m, v), target)
}

/// One step with moments of 8 bits: they are widened, stepped in f32, and rounded again, block by block.
#[allow(clippy::too_many_arguments)]
pub fn step_coded<T: Element, P: Position>(
    threads: usize,
    cfg: &AdamW,
    clock: Clock<'_>,
    gate: Option<Gate<'_>>,
    value: &mut [f32],
    grad: &[f32],
    m: Codes<'_>,
    v: Codes<'_>,
    target: Option<(&str, &mut [T], &[P])>,
) -> Result<()> {
    m.check("exp_avg", value.len())?;
    v.check("exp_avg_sq", value.len())?;
    run(threads, cfg, clock, gate, value, grad, Moments::Coded(Both(m, v)), target)
}

#[allow(clippy::too_many_arguments)]
fn run<T: Element, P: Position>(
    threads: usize,
    cfg: &AdamW,
    clock: Clock<'_>,
    gate: Option<Gate<'_>>,
    value: &mut [f32],
    grad: &[f32],
    moments: Moments<'_>,
    target: Option<(&str, &mut [T], &[P])>,
) -> Result<()> {
    let n = value.len();
    check_len("grad", grad.len(), n)?;
    if let Some((open, _)) = gate {
        check_len("gate", open.len(), n)?;
    }
    let (biases, ages) = match clock {
        Clock::Shared(0) => {
            return Err(Error::Value {
                name: "step".to_string(),
                rule: "at least 1".to_string(),
                got: "0".to_string(),
            });
        }
        Clock::Shared(t) => (Biases::One(Bias::new(cfg, t as f64)), None),
        Clock::Each(ages) => {
            check_len("step", ages.len(), n)?;
            (Biases::of(cfg, ages)?, Some(ages))
        }
    };
    let target = match target {
        None => None,
        Some((name, dst, index)) => {
            check_len("index", index.len(), n)?;
            Some(Target::new(threads, name, dst, index)?)
        }
    };
    let (f, biases) = (Factors::new(cfg), &biases);
    let state = State { value, grad, moments, ages, gate, target };
    each(threads, GRAIN, state, |state| wide(Step { f, biases, state }));
    Ok(())
}

/// A piece of one step.
struct Step<'a, T, P> {
    f: Factors,
    biases: &'a Biases,
    state: State<'a, T, P>,
}

impl<T: Element, P: Position> Loop for Step<'_, T, P> {
    type Output = ();
    #[inline(always)]
    fn run(self, _: impl Isa) {
        let (f, biases, s) = (self.f, self.biases, self.state);
        let (value, grad, mut ages) = (&mut *s.value, s.grad, s.ages);
        match s.moments {
            Moments::Wide(m, v) => Rows { value, grad, m, v, ages, gate: s.gate }.step(f, biases),
            Moments::Coded(both) => both.each_block(|at, m, v| {
                let here = at..at + m.len();
                let ages = ages.as_deref_mut().map(|ages| &mut ages[here.clone()]);
                let gate = s.gate.map(|(open, closed)| (&open[here.clone()], closed));
                let (value, grad) = (&mut value[here.clone()], &grad[here]);
                Rows { value, grad, m, v, ages, gate }.step(f, biases);
            }),
        }
        if let Some(mut target) = s.target {
            target.write(s.value, T::from_f32);
        }
    }
}

/// Coordinates with their moments in f32.
struct Rows<'a> {
    value: &'a mut [f32],
    grad: &'a [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    ages: Option<&'a mut [i32]>,
    gate: Option<Gate<'a>>,
}

/// Coordinates whose bias corrections are looked up together, so that the rest becomes vector code.
const LOOKED_UP: usize = 64;

impl Rows<'_> {
    #[inline(always)]
    fn step(mut self, f: Factors, biases: &Biases) {
        if let Some((open, closed)) = self.gate {
            return self.gated(f, biases, open, closed);
        }
        for age in self.ages.iter_mut().flat_map(|ages| ages.iter_mut()) {
            *age += 1;
        }
        match biases {
            Biases::One(bias) => {
                let rows = self.value.iter_mut().zip(self.grad).zip(&mut *self.m).zip(&mut *self.v);
                for (((x, g), m), v) in rows {
                    (*x, *m, *v) = f.update(*bias, *x, *g, *m, *v);
                }
            }
            biases => self.by_age(f, biases),
        }
    }

    #[inline(always)]
    fn by_age(&mut self, f: Factors, biases: &Biases) {
        let (mut roots, mut steps) = ([1.0; LOOKED_UP], [0.0; LOOKED_UP]);
        let ages = self.ages.iter().flat_map(|ages| ages.chunks(LOOKED_UP));
        let rows = self.value.chunks_mut(LOOKED_UP).zip(self.grad.chunks(LOOKED_UP));
        let state = self.m.chunks_mut(LOOKED_UP).zip(self.v.chunks_mut(LOOKED_UP));
        for (((x, g), (m, v)), ages) in rows.zip(state).zip(ages) {
            for ((root, step), age) in roots.iter_mut().zip(&mut steps).zip(ages) {
                Bias { root_bias2: *root, minus_step: *step } = biases.at(*age);
            }
            let rows = x.iter_mut().zip(g).zip(m.iter_mut()).zip(v);
            for ((((x, g), m), v), (root, step)) in rows.zip(roots.iter().zip(&steps)) {
                let bias = Bias { root_bias2: *root, minus_step: *step };
                (*x, *m, *v) = f.update(bias, *x, *g, *m, *v);
            }
        }
    }

    #[inline(always)]
    fn gated(&mut self, f: Factors, biases: &Biases, open: &[u8], closed: Closed) {
        // One case for each loop, and a choice between values in it, so that it becomes vector code.
        match (biases, &self.ages, closed) {
            (Biases::One(bias), None, Closed::Updated { decay: false }) => {
                self.chosen(f, *bias, open, |x, _, _, m, v| (x, m, v));
            }
            (Biases::One(bias), None, Closed::Updated { decay: true }) => {
                self.chosen(f, *bias, open, |x, _, _, m, v| (x * f.decay, m, v));
            }
            (Biases::One(bias), None, Closed::Frozen) => {
                self.chosen(f, *bias, open, |x, m, v, _, _| (x, m, v));
            }
            (Biases::One(bias), None, Closed::Reset) => {
                self.chosen(f, *bias, open, |x, _, _, _, _| (x, 0.0, 0.0));
            }
            _ => self.gated_by_age(f, biases, open, closed),
        }
    }

    /// `shut` gives the closed (x, m, v), of x, m, v before the step and of m and v after it.
    #[inline(always)]
    fn chosen(
        &mut self,
        f: Factors,
        bias: Bias,
        open: &[u8],
        shut: impl Fn(f32, f32, f32, f32, f32) -> (f32, f32, f32),
    ) {
        let rows = self.value.iter_mut().zip(self.grad).zip(&mut *self.m).zip(&mut *self.v);
        for ((((x, g), m), v), open) in rows.zip(open) {
            let new = f.update(bias, *x, *g, *m, *v);
            let old = shut(*x, *m, *v, new.1, new.2);
            let choose = |new: f32, old: f32| if *open != 0 { new } else { old };
            (*x, *m, *v) = (choose(new.0, old.0), choose(new.1, old.1), choose(new.2, old.2));
        }
    }

    #[inline(always)]
    fn gated_by_age(&mut self, f: Factors, biases: &Biases, open: &[u8], closed: Closed) {
        let rows = self.value.iter_mut().zip(self.grad).zip(&mut *self.m).zip(&mut *self.v);
        for (i, ((((x, g), m), v), open)) in rows.zip(open).enumerate() {
            let open = *open != 0;
            let mut no_clock = 0;
            let age = self.ages.as_deref_mut().map_or(&mut no_clock, |ages| &mut ages[i]);
            match closed {
                Closed::Frozen if !open => continue,
                Closed::Reset if !open => {
                    (*m, *v, *age) = (0.0, 0.0, 0);
                    continue;
                }
                _ => {}
            }
            *age += 1;
            let y;
            (y, *m, *v) = f.update(biases.at(*age), *x, *g, *m, *v);
            if open {
                *x = y;
            } else if closed == (Closed::Updated { decay: true }) {
                *x *= f.decay;
            }
        }
    }
}

/// Where the moments are between steps.
enum Moments<'a> {
    Wide(&'a mut [f32], &'a mut [f32]),
    Coded(Both<'a>),
}

struct State<'a, T, P> {
    value: &'a mut [f32],
    grad: &'a [f32],
    moments: Moments<'a>,
    ages: Option<&'a mut [i32]>,
    gate: Option<Gate<'a>>,
    target: Option<Target<'a, T, P>>,
}

impl<T: Element, P: Position> Divide for State<'_, T, P> {
    fn len(&self) -> usize {
        self.value.len()
    }
    fn divide(self, at: usize) -> (Self, Self) {
        let (x, y) = self.value.split_at_mut(at);
        let (g, h) = self.grad.split_at(at);
        let (m, n) = match self.moments {
            Moments::Wide(m, v) => {
                let ((m, n), (v, w)) = (m.split_at_mut(at), v.split_at_mut(at));
                (Moments::Wide(m, v), Moments::Wide(n, w))
            }
            Moments::Coded(Both(m, v)) => {
                let ((m, n), (v, w)) = (m.divide(at), v.divide(at));
                (Moments::Coded(Both(m, v)), Moments::Coded(Both(n, w)))
            }
        };
        let (a, b) = self.ages.map(|a| a.split_at_mut(at)).unzip();
        let (c, d) = self
            .gate
            .map(|(open, closed)| {
                let (c, d) = open.split_at(at);
                ((c, closed), (d, closed))
            })
            .unzip();
        let (s, t) = self.target.map(|t| t.divide(at)).unzip();
        (
            State { value: x, grad: g, moments: m, ages: a, gate: c, target: s },
            State { value: y, grad: h, moments: n, ages: b, gate: d, target: t },
        )
    }
}
