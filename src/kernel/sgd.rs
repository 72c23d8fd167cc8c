//! Stochastic gradient descent with momentum (Sutskever et al., 2013) on compact values:
//!
//! ```text
//! d ← g + wd·x      b ← μ b + (1 − dampening) d   (b ← d at first)
//! x ← x − lr·b,  or with Nesterov's momentum  x ← x − lr (d + μ b)
//! ```
//!
//! in the order and with the roundings of `torch.optim.SGD` (single tensor) on a processor with fused
//! multiply-add.
use super::chunk::{Divide, check_len, each};
use super::gather::{GRAIN, Target};
use super::wide::{Isa, Loop, wide};
use crate::error::{Error, Result};
use crate::num::{Element, Position};

/// Hyperparameters, as Python gives them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sgd {
    /// learning rate
    pub lr: f64,
    /// decay of the momentum buffer
    pub momentum: f64,
    /// how much of the gradient the buffer does not take
    pub dampening: f64,
    /// weight decay, added to the gradient
    pub weight_decay: f64,
    /// look ahead by one step of momentum
    pub nesterov: bool,
    /// ascend instead of descend
    pub maximize: bool,
}

/// The hyperparameters, each rounded once.
#[derive(Clone, Copy)]
struct Factors {
    minus_lr: f32,
    momentum: f32,
    take: f32,
    weight_decay: f32,
    sign: f32,
    nesterov: bool,
    first: bool,
}

impl Factors {
    /// The direction before momentum.
    #[inline(always)]
    fn direction(&self, x: f32, g: f32) -> f32 {
        let g = g * self.sign;
        // Without decay torch does not look at x, which may be infinite.
        if self.weight_decay == 0.0 { g } else { x.mul_add(self.weight_decay, g) }
    }

    /// The new buffer.
    #[inline(always)]
    fn buffer(&self, b: f32, d: f32) -> f32 {
        if self.first { d } else { d.mul_add(self.take, b * self.momentum) }
    }
}

/// One step. `first` says that the buffer has no history: it becomes the direction. `value` holds the
/// f32 master values; `target` is the weight and the positions in it that receive them, rounded once.
pub fn step<T: Element, P: Position>(
    threads: usize,
    cfg: &Sgd,
    first: bool,
    value: &mut [f32],
    grad: &[f32],
    buf: Option<&mut [f32]>,
    target: Option<(&str, &mut [T], &[P])>,
) -> Result<()> {
    let n = value.len();
    check_len("grad", grad.len(), n)?;
    match &buf {
        Some(buf) => check_len("momentum_buffer", buf.len(), n)?,
        None if cfg.momentum != 0.0 => {
            return Err(Error::Value {
                name: "momentum".to_string(),
                rule: "0 where there is no momentum buffer".to_string(),
                got: cfg.momentum.to_string(),
            });
        }
        None => {}
    }
    let target = match target {
        None => None,
        Some((name, dst, index)) => {
            check_len("index", index.len(), n)?;
            Some(Target::new(threads, name, dst, index)?)
        }
    };
    let f = Factors {
        minus_lr: -cfg.lr as f32,
        momentum: cfg.momentum as f32,
        take: (1.0 - cfg.dampening) as f32,
        weight_decay: cfg.weight_decay as f32,
        sign: if cfg.maximize { -1.0 } else { 1.0 },
        nesterov: cfg.nesterov,
        first,
    };
    each(threads, GRAIN, State { value, grad, buf, target }, |state| wide(Step { f, state }));
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
        let pairs = s.value.iter_mut().zip(s.grad);
        match s.buf {
            None => {
                for (x, g) in pairs {
                    *x = f.direction(*x, *g).mul_add(f.minus_lr, *x);
                }
            }
            Some(buf) => {
                for ((x, g), b) in pairs.zip(buf) {
                    let d = f.direction(*x, *g);
                    *b = f.buffer(*b, d);
                    let d = if f.nesterov { b.mul_add(f.momentum, d) } else { *b };
                    *x = d.mul_add(f.minus_lr, *x);
                }
            }
        }
        if let Some(mut target) = s.target {
            target.write(s.value, T::from_f32);
        }
    }
}

struct State<'a, T, P> {
    value: &'a mut [f32],
    grad: &'a [f32],
    buf: Option<&'a mut [f32]>,
    target: Option<Target<'a, T, P>>,
}

impl<T: Element, P: Position> Divide for State<'_, T, P> {
    fn len(&self) -> usize {
        self.value.len()
    }
    fn divide(self, at: usize) -> (Self, Self) {
        let (x, y) = self.value.split_at_mut(at);
        let (g, h) = self.grad.split_at(at);
        let (b, c) = self.buf.map(|b| b.split_at_mut(at)).unzip();
        let (s, t) = self.target.map(|t| t.divide(at)).unzip();
        (
            State { value: x, grad: g, buf: b, target: s },
            State { value: y, grad: h, buf: c, target: t },
        )
    }
}
