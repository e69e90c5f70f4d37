//! `top`: live view of daemons from their admin ports: rates, lag, phases, what is missing.

mod page;
mod screen;

pub use crate::console::source::Source;
pub use page::Page;
pub use screen::{plain, run};
