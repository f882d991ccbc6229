// SwiGLU on blocks of 128 floats, for its forward and its backward pass; needs arithmetic.h. See
// every_isa.h.

namespace deepkern::DEEPKERN_ISA {
namespace {

// silu(gate) * up, multiplied from left to right.
DEEPKERN_INLINE Floats swiglu(Floats gate, Floats up) { return gate * exact_sigmoid(gate) * up; }

// gate = min(gate, limit), up = clamp(up, -limit, limit); NaN stays NaN.
DEEPKERN_INLINE void clamp_gate_up(float* gate, float* up, float limit) {
  const Floats highest = broadcast(limit);
  const Floats lowest = broadcast(0.0f - limit);  // +0 for a limit of 0; -limit would be -0
  for (int k = 0; k < 128; k += LANES) {
    const Floats g = load_vector<Floats>(gate + k), u = load_vector<Floats>(up + k);
    store_vector(gate + k, g > highest ? highest : g);
    store_vector(up + k, u > highest ? highest : u < lowest ? lowest : u);
  }
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
