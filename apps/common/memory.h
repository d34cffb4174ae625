#pragma once

#include <cstdint>
#include <string>

namespace lexico::apps {

std::int64_t resident_bytes();       ///< of this process, now; 0: the system does not say
std::int64_t peak_resident_bytes();  ///< the most so far

/// Bytes that this process can still get without pushing others out: what the machine has, or less
/// where a control group (a container, a batch job) has a limit. -1: unknown.
std::int64_t available_memory_bytes();

/// What a program with libtorch still comes to touch after it was set up, most of it as the process
/// ends. Measured.
inline constexpr double kTorchBytes = 100e6;

/// Whether a process of so many bytes at its peak, this one, finds them; also where that is
/// unknown.
bool fits_memory(double bytes);
/// Before the work. @param bytes  of the whole process at its peak.
/// @throws ResourceError saying what is needed, what is there, and `advice`.
void require_memory(double bytes, const std::string& advice);
/// The same for a disk. @param bytes  beyond what is there now.
void require_disk(const std::string& path, double bytes, const std::string& advice);

}  // namespace lexico::apps
