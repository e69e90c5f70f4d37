//! SIGINT and SIGTERM: the first signal requests a stop, the second one ends the process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

use crate::error::CommandError;

/// Set by the first signal.
#[derive(Clone)]
pub(super) struct StopSignal(Arc<AtomicBool>);

impl StopSignal {
    /// Listens on a separate thread until the process ends.
    pub(super) fn listen(runtime: Runtime) -> Result<Self, CommandError> {
        let stop = Self(Arc::new(AtomicBool::new(false)));
        let failed = |error| CommandError::failed(format!("cannot listen for signals: {error}"));
        let (mut interrupt, mut terminate) = {
            let _inside = runtime.enter();
            (
                signal(SignalKind::interrupt()).map_err(failed)?,
                signal(SignalKind::terminate()).map_err(failed)?,
            )
        };
        let flag = stop.clone();
        let listen = move || {
            runtime.block_on(async {
                loop {
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => {}
                    }
                    if flag.0.swap(true, Ordering::Relaxed) {
                        std::process::exit(1);
                    }
                }
            });
        };
        std::thread::Builder::new().name("signals".to_owned()).spawn(listen).map_err(failed)?;
        Ok(stop)
    }

    pub(super) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
