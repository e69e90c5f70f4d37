//! The allocator of the whole process, librdkafka included. The program's, not the library's: whoever links the
//! library may count allocations. Benches that measure time take it in by its path.
//!
//! Records are allocated by the client's threads and freed by a lane's, messages the other way round. glibc's
//! allocator keeps what a thread freed for that thread's arena: a drain at full speed held 240 to 300 MB with
//! it, 150 with jemalloc limited to two arenas, and a third of the daemon's CPU time was saved besides.

#[global_allocator]
static GLOBAL: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Read by jemalloc when it starts: two arenas, and freed pages go back to the system after ten seconds. A batch's
/// messages are freed and allocated again several times a second; with half a second a fifth of the daemon's CPU time
/// in a drain went into giving pages back and faulting them in again, for 20 MB less of resident memory.
#[allow(unsafe_code)]
// SAFETY: jemalloc alone uses this name, for exactly this: a string that ends with NUL.
#[unsafe(export_name = "malloc_conf")]
pub static MALLOC_CONF: &[u8; 48] = b"narenas:2,dirty_decay_ms:10000,muzzy_decay_ms:0\0";
