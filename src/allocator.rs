//! The allocator of the whole process, librdkafka included. It belongs to the program, not to the library,
//! because a bench that links the library counts allocations with an allocator of its own. Benches that
//! measure time include this file by path.
//!
//! Records are allocated by librdkafka's threads and freed by a lane's, messages the other way round. glibc's
//! allocator returns freed memory to the arena that it came from: at full speed a drain held 240 to 300 MB
//! with glibc, and 150 MB with jemalloc limited to two arenas, which also saved a third of the daemon's CPU
//! time.

#[global_allocator]
static GLOBAL: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// jemalloc reads this at its start: two arenas, and freed pages are returned to the system after ten
/// seconds. A batch's messages are freed and allocated again several times a second. With half a second
/// instead of ten, a drain spent a fifth of its CPU time on returning pages and faulting them in again, and
/// saved 20 MB of resident memory.
#[allow(unsafe_code)]
// SAFETY: only jemalloc uses this symbol, and it expects a NUL-terminated string.
#[unsafe(export_name = "malloc_conf")]
pub static MALLOC_CONF: &[u8; 48] = b"narenas:2,dirty_decay_ms:10000,muzzy_decay_ms:0\0";
