//! Lion (Chen et al., 2023) on compact values:
//!
//! ```text
//! x ← x (1 − lr·wd)      x ← x − lr · sign(β1 m + (1 − β1) g)      m ← β2 m + (1 − β2) g
//! ```
//!
//! in the order and with the roundings of the same formula in torch's operations (`mul`, `add` with a
//! factor, `sign`) on a processor with fused multiply-add.
use super::chunk::{Divide, check_len, each};
use super::gather::{GRAIN, Target};
use super::wide::{Isa, Loop, wide};
use crate::error::Result;
use crate::num::{Element, Position};

/// Hyperparameters, as Python gives them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lion {
    /// learning rate
    pub lr: f64,
    /// share of the momentum in the direction
    pub beta1: f64,
    /// decay of the momentum
    pub beta2: f64,
    /// decoupled weight decay
    pub weight_decay: f64,
    /// ascend instead of descend
    pub maximize: bool,
}

/// The hyperparameters, each rounded once.
#[derive(Clone, Copy)]
struct Factors {
    decay: f32,
    minus_lr: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    sign: f32,
}

impl Factors {
    /// One coordinate: the new value and momentum.
    #[inline(always)]
    fn update(&self, x: f32, g: f32, m: f32) -> (f32, f32) {
        let g = g * self.sign;
        let way = g.mul_add(self.one_minus_beta1, m * self.beta1);
        let one = if way == 0.0 || way.is_nan() { way } else { 1f32.copysign(way) };
        let m = g.mul_add(self.one_minus_beta2, m * self.beta2);
        (one.mul_add(self.minus_lr, x * self.decay), m)
    }
}

/// One step. `value` holds the f32 master values; `target` is the weight and the positions in it that
/// receive them, rounded once.
pub fn step<T: Element, P: Position>(
    threads: usize,
    cfg: &Lion,
    value: &mut [f32],
    grad: &[f32],
    m: &mut [f32],
    target: Option<(&str, &mut [T], &[P])>,
) -> Result<()> {
    let n = value.len();
    check_len("grad", grad.len(), n)?;
    check_len("exp_avg", m.len(), n)?;
    let target = match target {
        None => None,
        Some((name, dst, index)) => {
            check_len("index", index.len(), n)?;
            Some(Target::new(threads, name, dst, index)?)
        }
    };
    let f = Factors {
        decay: (1.0 - cfg.lr * cfg.weight_decay) as f32,
        minus_lr: -cfg.lr as f32,
        beta1: cfg.beta1 as f32,
        one_minus_beta1: (1.0 - cfg.beta1) as f32,
        beta2: cfg.beta2 as f32,
        one_minus_beta2: (1.0 - cfg.beta2) as f32,
        sign: if cfg.maximize { -1.0 } else { 1.0 },
    };
    each(threads, GRAIN, State { value, grad, m, target }, |state| wide(Step { f, state }));
    Ok(())
}

/// A piece of one step.
struct Step<'a, T, P> {
    f: Factors,
    state: State<'a, T, P>,
}

impl<T: Element, P: Position> Loop for Step<'_, T, P> {
    type Output = ();
    #[inline(always)]
    fn run(self, _: impl Isa) {
        let (f, s) = (self.f, self.state);
        for ((x, g), m) in s.value.iter_mut().zip(s.grad).zip(s.m) {
            (*x, *m) = f.update(*x, *g, *m);
        }
        if let Some(mut target) = s.target {
            target.write(s.value, T::from_f32);
        }
    }
}

struct State<'a, T, P> {
    value: &'a mut [f32],
    grad: &'a [f32],
    m: &'a mut [f32],
    target: Option<Target<'a, T, P>>,
}

impl<T: Element, P: Position> Divide for State<'_, T, P> {
    fn len(&self) -> usize {
        self.value.len()
    }
    fn divide(self, at: usize) -> (Self, Self) {
        let (x, y) = self.value.split_at_mut(at);
        let (g, h) = self.grad.split_at(at);
        let (m, n) = self.m.split_at_mut(at);
        let (s, t) = self.target.map(|t| t.divide(at)).unzip();
        (State { value: x, grad: g, m, target: s }, State { value: y, grad: h, m: n, target: t })
    }
}
