// The kernels, written once over the sixteen lanes of a simd_*.h; each isa_*.cpp includes both inside a namespace of its own.
#include "elementwise.inl"
#include "dense.inl"
#include "matmul.inl"
#include "quantized.inl"
#include "attention.inl"
#include "attention_back.inl"

static const Kernels kTable = {KERNELS_NAME, kSignedDot, tile_rows, dense, quantized, add_low_rank, matmul_panels, matmul, across, packed_attention_scratch, attend_sequence, attend_sequence_back, quantize_row, rms_norm, rms_norm_back, rotate, gate, gate_back, layer_norm, add_scaled, activate, softcap, embed_row, store_kv, attend, merge};
