// How the test programs (core_host.cpp, emulation/kernels.cpp) read and write arrays: each a block of its own of
// exactly its size, so that a sanitizer sees any access beyond it.
#pragma once

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <memory>

typedef std::unique_ptr<char[]> Bytes;

inline Bytes allocate(size_t size) { return Bytes(new char[size]); }

inline Bytes read(size_t size) {
  Bytes bytes = allocate(size);
  if (std::fread(bytes.get(), 1, size, stdin) != size) std::exit(2);
  return bytes;
}

inline void write(const Bytes& bytes, size_t size) { std::fwrite(bytes.get(), 1, size, stdout); }
