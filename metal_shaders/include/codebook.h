// Centroids of a product-VQ section, in threadgroup memory ("shared") or, where they do not fit, in device memory.
#define NUM_CENTROIDS 256

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

// The centroid that starts at entry `at` of the tables; IS_SHARED says which pointer counts.
template <int d, bool IS_SHARED>
METAL_FUNC void load_centroid(const threadgroup half* shared, const device half* tables, int at, thread float* out) {
  if (IS_SHARED) {
    load_shared<d>(shared + at, out);
  } else {
    load_device<d>(tables + at, out);
  }
}
