// Centroids of a product-VQ section, in threadgroup memory ("shared") or, where they do not fit, in device memory.
#define NUM_CENTROIDS 256

// What products are made of: A is float, one channel at a time, or half, two.
template <typename A>
struct Element {
  typedef float type;
  typedef float4 quad;  // four A
};
template <>
struct Element<half> {
  typedef half2 type;
  typedef half4 quad;
};

METAL_FUNC float splat(float v) { return v; }
METAL_FUNC half2 splat(half v) { return half2(v, v); }

// d channels of a vector of halves, as elements.
template <int d>
METAL_FUNC void load_shared(const threadgroup half* at, thread half2* out) {
  if (d == 2) {
    out[0] = *(const threadgroup half2*)at;
    return;
  }
  for (int i = 0; i + 4 <= d; i += 4) {
    const half4 v = *(const threadgroup half4*)(at + i);
    out[i / 2] = half2(v.x, v.y);
    out[i / 2 + 1] = half2(v.z, v.w);
  }
}

template <int d>
METAL_FUNC void load_device(const device half* at, thread half2* out) {
  if (d == 2) {
    out[0] = *(const device half2*)at;
    return;
  }
  for (int i = 0; i + 4 <= d; i += 4) {
    const half4 v = *(const device half4*)(at + i);
    out[i / 2] = half2(v.x, v.y);
    out[i / 2 + 1] = half2(v.z, v.w);
  }
}

template <int d>
METAL_FUNC void load_shared(const threadgroup half* at, thread float* out) {
  if (d == 2) {
    const half2 v = *(const threadgroup half2*)at;
    out[0] = float(v.x);
    out[1] = float(v.y);
    return;
  }
  for (int i = 0; i + 4 <= d; i += 4) {
    const half4 v = *(const threadgroup half4*)(at + i);
    out[i] = float(v.x);
    out[i + 1] = float(v.y);
    out[i + 2] = float(v.z);
    out[i + 3] = float(v.w);
  }
}

template <int d>
METAL_FUNC void load_device(const device half* at, thread float* out) {
  if (d == 2) {
    const half2 v = *(const device half2*)at;
    out[0] = float(v.x);
    out[1] = float(v.y);
    return;
  }
  for (int i = 0; i + 4 <= d; i += 4) {
    const half4 v = *(const device half4*)(at + i);
    out[i] = float(v.x);
    out[i + 1] = float(v.y);
    out[i + 2] = float(v.z);
    out[i + 3] = float(v.w);
  }
}

// Tables [G][256][d] into threadgroup memory as [256][G][d]: lanes that read different tables then never share a bank.
template <int d, int G>
METAL_FUNC void share_tables(const device half* tables, int thread_id, int num_threads, threadgroup half* shared) {
  for (int i = thread_id; i < G * NUM_CENTROIDS; i += num_threads) {
    const int at = (i % NUM_CENTROIDS * G + i / NUM_CENTROIDS) * d;
    if (d == 2) {
      *(threadgroup half2*)(shared + at) = *(const device half2*)(tables + i * d);
    }
    for (int k = 0; k + 4 <= d; k += 4) {
      *(threadgroup half4*)(shared + at + k) = *(const device half4*)(tables + i * d + k);
    }
  }
}

// Bytes before the first entry of table `table`.
template <int d, bool IS_SHARED>
METAL_FUNC uint table_bytes(int table) {
  return uint(table) * uint((IS_SHARED ? 1 : NUM_CENTROIDS) * d * 2);
}

// The centroid of code `byte` of `word` in the table that starts at `first` bytes; IS_SHARED says which pointer counts.
// A table's start has no bits in common with offsets inside it, so `|` adds (one instruction with the mask).
template <int d, int G, bool IS_SHARED, typename E>
METAL_FUNC void load_centroid(const threadgroup half* shared, const device half* tables, uint first, uint word, int byte,
                              thread E* out) {
  constexpr int SHIFT = (d == 2 ? 2 : d == 4 ? 3 : 4) + (!IS_SHARED || G == 1 ? 0 : G == 2 ? 1 : 2);
  const uint moved = 8 * byte > SHIFT ? word >> uint(8 * byte > SHIFT ? 8 * byte - SHIFT : 0) : word << uint(SHIFT);
  const uint offset = (moved & (255u << uint(SHIFT))) | first;
  if (IS_SHARED) {
    load_shared<d>((const threadgroup half*)((const threadgroup uchar*)shared + offset), out);
  } else {
    load_device<d>((const device half*)((const device uchar*)tables + offset), out);
  }
}
