//! One binary: links once.
mod algebra;
mod architecture;
mod moving;
mod random;
mod selecting;
mod stepping;
