// The only file that sees Python. Checks what a caller may get wrong, turns integers into pointers and calls the
// kernels without the GIL. Signatures and their meaning: fastft/_C.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "fastft/adamw.h"
#include "fastft/cross_entropy.h"
#include "fastft/decoder.h"
#include "fastft/sum_squares.h"
#include "kernels.h"

namespace py = pybind11;
using fastft::DType;
using Address = std::uintptr_t;
using Addresses = std::vector<Address>;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

DType dtype(int tag, const char* name) {
  if (tag != static_cast<int>(DType::f32) && tag != static_cast<int>(DType::bf16)) {
    fail(std::string(name) + "=" + std::to_string(tag) + " is not a known dtype tag; use F32 or BF16");
  }
  return static_cast<DType>(tag);
}

void check_device(int device) {
  if (device < -1) fail("device=" + std::to_string(device) + "; use -1 for the CPU or a CUDA device ordinal");
#ifndef FASTFT_CUDA
  if (device >= 0) {
    fail("device=" + std::to_string(device) +
         ", but fastft was built without CUDA; reinstall it with FASTFT_BUILD=cuda and a CUDA toolkit");
  }
#endif
}

void check_not_negative(std::int64_t value, const std::string& name) {
  if (value < 0) fail(name + "=" + std::to_string(value) + " is negative");
}

template <class T>
void check_length(const std::vector<T>& list, const char* name, std::size_t want, bool may_be_empty) {
  if (list.size() == want || (may_be_empty && list.empty())) return;
  fail(std::string(name) + " has " + std::to_string(list.size()) + " entries, params has " + std::to_string(want));
}

// Tags of ParamStore and StateStore are their values
int store_tag(int tag, const char* name) {
  if (tag < 0 || tag > 2) fail(std::string(name) + "=" + std::to_string(tag) + " is not known; use 0, 1 or 2");
  return tag;
}

void adamw(int device, Address stream, const Addresses& params, const Addresses& grads, const Addresses& exp_avgs,
           const Addresses& exp_avg_sqs, const Addresses& max_exp_avg_sqs, const Addresses& copies,
           const Addresses& remainders, const Addresses& exp_avg_scales, const Addresses& exp_avg_sq_scales,
           const Addresses& steps, const std::vector<std::int64_t>& numels, const std::vector<std::int64_t>& offsets,
           int param_dtype, int grad_dtype, int param_store, int state_store, std::uint64_t seed, double lr,
           Address lr_ptr, double beta1, double beta2, double eps, double weight_decay, bool decoupled, bool maximize,
           Address grad_scale, Address found_inf, int num_threads, Address scratch) {
  check_device(device);
  const std::size_t count = params.size();
  const fastft::AdamWOptions options{dtype(param_dtype, "param_dtype"),
                                     dtype(grad_dtype, "grad_dtype"),
                                     static_cast<fastft::ParamStore>(store_tag(param_store, "param_store")),
                                     static_cast<fastft::StateStore>(store_tag(state_store, "state_store")),
                                     seed,
                                     lr,
                                     at<float>(lr_ptr),
                                     beta1,
                                     beta2,
                                     eps,
                                     weight_decay,
                                     decoupled,
                                     maximize,
                                     at<float>(grad_scale),
                                     at<float>(found_inf)};
  const bool coded = options.state_store == fastft::StateStore::u8,
             split = options.param_store == fastft::ParamStore::remainder;
  if (options.param_dtype == DType::f32 && param_store != 0)
    fail("param_store=" + std::to_string(param_store) + " is for bf16 params");
  if (coded && !max_exp_avg_sqs.empty()) fail("max_exp_avg_sqs with state_store=2: amsgrad has no 8-bit state");
  check_length(grads, "grads", count, false);
  check_length(exp_avgs, "exp_avgs", count, false);
  check_length(exp_avg_sqs, "exp_avg_sqs", count, false);
  check_length(max_exp_avg_sqs, "max_exp_avg_sqs", count, true);
  check_length(copies, "copies", count, true);
  check_length(remainders, "remainders", count, !split);
  check_length(exp_avg_scales, "exp_avg_scales", count, !coded);
  check_length(exp_avg_sq_scales, "exp_avg_sq_scales", count, !coded);
  check_length(steps, "steps", count, false);
  check_length(numels, "numels", count, false);
  check_length(offsets, "offsets", count, true);
  const auto entry = [](const Addresses& list, std::size_t i) { return list.empty() ? 0 : list[i]; };
  std::vector<fastft::AdamWTensor> tensors(count);
  for (std::size_t i = 0; i < count; ++i) {
    check_not_negative(numels[i], "numels[" + std::to_string(i) + "]");
    if (steps[i] == 0) fail("steps[" + std::to_string(i) + "] is 0; a step counter is always needed");
    tensors[i] = {at<void>(params[i]),
                  at<void>(grads[i]),
                  at<void>(exp_avgs[i]),
                  at<void>(exp_avg_sqs[i]),
                  at<void>(entry(max_exp_avg_sqs, i)),
                  at<fastft::bf16>(entry(copies, i)),
                  at<std::int16_t>(entry(remainders, i)),
                  at<float>(entry(exp_avg_scales, i)),
                  at<float>(entry(exp_avg_sq_scales, i)),
                  at<float>(steps[i]),
                  numels[i],
                  offsets.empty() ? 0 : offsets[i]};
  }
  py::gil_scoped_release release;
  if (device < 0) return fastft::adamw_cpu(tensors.data(), count, options, num_threads);
#ifdef FASTFT_CUDA
  fastft::adamw_cuda(tensors.data(), count, options, device, at<void>(stream), at<void>(scratch));
#else
  (void)stream;
  (void)scratch;
#endif
}

void cross_entropy(int device, Address stream, Address logits, int tag, std::int64_t rows, std::int64_t vocab,
                   std::int64_t logits_stride, Address target, Address class_weight, Address token_weight,
                   std::int64_t token_weight_stride, std::int64_t ignore_index, double label_smoothing, double z_loss,
                   double softcap, double logit_scale, Address loss, Address lse, Address grad,
                   std::int64_t grad_stride, Address grad_scale, std::int64_t grad_scale_stride, Address bad_row,
                   int num_threads, int variant) {
  check_device(device);
  check_not_negative(rows, "rows");
  check_not_negative(vocab, "vocab");
  check_not_negative(logits_stride, "logits_stride");
  check_not_negative(token_weight_stride, "token_weight_stride");
  check_not_negative(grad_scale_stride, "grad_scale_stride");
  if (grad) check_not_negative(grad_stride, "grad_stride");
  if (rows > 0 && vocab == 0) fail("vocab=0 with rows=" + std::to_string(rows) + ": a softmax needs a class");
  if (!(softcap >= 0.0)) fail("softcap=" + std::to_string(softcap) + " must be positive, or 0 for none");
  const fastft::CrossEntropyArgs args{at<void>(logits),
                                      dtype(tag, "dtype"),
                                      rows,
                                      vocab,
                                      logits_stride,
                                      at<std::int64_t>(target),
                                      at<float>(class_weight),
                                      at<float>(token_weight),
                                      token_weight_stride,
                                      ignore_index,
                                      label_smoothing,
                                      z_loss,
                                      softcap,
                                      logit_scale,
                                      at<float>(loss),
                                      at<float>(lse),
                                      at<void>(grad),
                                      grad_stride,
                                      at<float>(grad_scale),
                                      grad_scale_stride,
                                      at<std::int64_t>(bad_row),
                                      variant};
  py::gil_scoped_release release;
  if (device < 0) return fastft::cross_entropy_cpu(args, num_threads);
#ifdef FASTFT_CUDA
  fastft::cross_entropy_cuda(args, device, at<void>(stream));
#else
  (void)stream;
#endif
}

void sum_squares(int device, Address stream, const Addresses& tensors, const std::vector<std::int64_t>& numels, int tag,
                 Address out, Address scratch, int num_threads) {
  check_device(device);
  if (numels.size() != tensors.size()) {
    fail("numels has " + std::to_string(numels.size()) + " entries, tensors has " + std::to_string(tensors.size()));
  }
  const DType type = dtype(tag, "dtype");
  std::vector<fastft::SumSquaresTensor> list(tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    check_not_negative(numels[i], "numels[" + std::to_string(i) + "]");
    list[i] = {at<void>(tensors[i]), numels[i]};
  }
  if (out == 0) fail("out is 0; the sum needs a place");
  py::gil_scoped_release release;
  if (device < 0) return fastft::sum_squares_cpu(list.data(), list.size(), type, at<double>(out), num_threads);
#ifdef FASTFT_CUDA
  fastft::sum_squares_cuda(list.data(), list.size(), type, at<double>(out), at<double>(scratch), device,
                           at<void>(stream));
#else
  (void)stream, (void)scratch;
#endif
}

void check_shape(std::int64_t rows, std::int64_t columns, std::int64_t stride) {
  check_not_negative(rows, "rows");
  check_not_negative(columns, "columns");
  if (stride < columns) fail("stride=" + std::to_string(stride) + " is less than " + std::to_string(columns));
}

void rms_forward(Address x, Address residual, Address weight, Address total, Address y, Address rstd, std::int64_t rows,
                 std::int64_t columns, double eps, int tag, int num_threads) {
  check_shape(rows, columns, columns);
  if (residual != 0 && total == 0) fail("total is 0; the sum needs a place");
  const fastft::RmsForward args{
      at<void>(x), at<void>(residual), at<void>(weight), at<void>(total), at<void>(y), at<float>(rstd), rows, columns,
      eps,         dtype(tag, "dtype")};
  py::gil_scoped_release release;
  fastft::rms_forward_cpu(args, num_threads);
}

void rms_backward(Address dy, Address x, Address weight, Address rstd, Address extra, Address dx, Address y,
                  Address dweight, std::int64_t rows, std::int64_t columns, int tag, int num_threads) {
  check_shape(rows, columns, columns);
  const fastft::RmsBackward args{
      at<void>(dy),       at<void>(x), at<void>(weight), at<float>(rstd),    at<void>(extra), at<void>(dx), at<void>(y),
      at<float>(dweight), rows,        columns,          dtype(tag, "dtype")};
  py::gil_scoped_release release;
  fastft::rms_backward_cpu(args, num_threads);
}

void rope(Address array, Address cos, Address sin, std::int64_t rows, std::int64_t stride, std::int64_t heads,
          std::int64_t dim, std::int64_t period, std::int64_t table_stride, bool back, int tag, int num_threads) {
  check_not_negative(heads, "heads");
  check_shape(rows, heads * dim, stride);
  if (dim < 2 || dim % 2 != 0) fail("dim=" + std::to_string(dim) + " is not an even number of elements");
  if (period < 1) fail("period=" + std::to_string(period) + " must be positive");
  check_shape(period, dim / 2, table_stride);
  const fastft::Rope args{at<void>(array), at<float>(cos), at<float>(sin),     rows, stride, heads, dim, period,
                          table_stride,    back,           dtype(tag, "dtype")};
  py::gil_scoped_release release;
  fastft::rope_cpu(args, num_threads);
}

void gated_forward(Address gate, Address up, Address out, std::int64_t rows, std::int64_t width, std::int64_t stride,
                   int tag, int num_threads) {
  check_shape(rows, width, stride);
  const fastft::GatedForward args{at<void>(gate), at<void>(up), at<void>(out),      rows,
                                  width,          stride,       dtype(tag, "dtype")};
  py::gil_scoped_release release;
  fastft::gated_forward_cpu(args, num_threads);
}

void gated_backward(Address gate, Address up, Address dout, Address out, Address dgate, Address dup, std::int64_t rows,
                    std::int64_t width, std::int64_t stride, int tag, int num_threads) {
  check_shape(rows, width, stride);
  const fastft::GatedBackward args{at<void>(gate), at<void>(up), at<void>(dout), at<void>(out), at<void>(dgate),
                                   at<void>(dup),  rows,         width,          stride,        dtype(tag, "dtype")};
  py::gil_scoped_release release;
  fastft::gated_backward_cpu(args, num_threads);
}

fastft::Attention attention_of(Address q, Address k, Address v, std::int64_t q_stride, std::int64_t k_stride,
                               std::int64_t v_stride, Address bounds, std::int64_t documents, std::int64_t tokens,
                               std::int64_t heads, std::int64_t groups, std::int64_t dim, double scale,
                               std::int64_t window, Address out, Address lse, int tag) {
  check_not_negative(documents, "documents");
  check_not_negative(window, "window");
  if (groups < 1 || heads < 1 || heads % groups != 0) {
    fail("heads=" + std::to_string(heads) + " is no multiple of groups=" + std::to_string(groups));
  }
  if (dim < 1) fail("dim=" + std::to_string(dim) + " must be positive");
  const std::int32_t* ends = at<std::int32_t>(bounds);
  for (std::int64_t i = 0; i < documents; ++i) {
    if (ends[i] < 0 || ends[i + 1] < ends[i] || ends[i + 1] > tokens) {
      fail("bounds[" + std::to_string(i + 1) + "]=" + std::to_string(ends[i + 1]) + " does not follow " +
           std::to_string(ends[i]) + " among " + std::to_string(tokens) + " tokens");
    }
  }
  return {at<void>(q), at<void>(k),         at<void>(v),   q_stride,      k_stride, v_stride,
          ends,        documents,           heads,         groups,        dim,      scale,
          window,      dtype(tag, "dtype"), at<void>(out), at<float>(lse)};
}

void attention_forward(Address q, Address k, Address v, std::int64_t q_stride, std::int64_t k_stride,
                       std::int64_t v_stride, Address bounds, std::int64_t documents, std::int64_t tokens,
                       std::int64_t heads, std::int64_t groups, std::int64_t dim, double scale, std::int64_t window,
                       Address out, Address lse, int tag, int num_threads) {
  const fastft::Attention args = attention_of(q, k, v, q_stride, k_stride, v_stride, bounds, documents, tokens, heads,
                                              groups, dim, scale, window, out, lse, tag);
  py::gil_scoped_release release;
  fastft::attention_forward_cpu(args, num_threads);
}

void attention_backward(Address q, Address k, Address v, std::int64_t q_stride, std::int64_t k_stride,
                        std::int64_t v_stride, Address bounds, std::int64_t documents, std::int64_t tokens,
                        std::int64_t heads, std::int64_t groups, std::int64_t dim, double scale, std::int64_t window,
                        Address out, Address lse, int tag, int num_threads, Address grad, Address dq, Address dk,
                        Address dv, std::int64_t dq_stride, std::int64_t dk_stride, std::int64_t dv_stride) {
  const fastft::Attention args = attention_of(q, k, v, q_stride, k_stride, v_stride, bounds, documents, tokens, heads,
                                              groups, dim, scale, window, out, lse, tag);
  const fastft::AttentionGradients grads{at<void>(grad), at<void>(dq), at<void>(dk), at<void>(dv),
                                         dq_stride,      dk_stride,    dv_stride};
  py::gil_scoped_release release;
  fastft::attention_backward_cpu(args, grads, num_threads);
}

void stream_4r3w(Address p, Address g, Address m, Address v, std::int64_t n, int num_threads) {
  check_not_negative(n, "n");
  py::gil_scoped_release release;
  fastft::cpu::stream_4r3w(at<float>(p), at<float>(g), at<float>(m), at<float>(v), n, num_threads);
}

py::dict build_info() {
  std::vector<std::string> archs, paths{"scalar"};
  bool cuda = false;
#ifdef FASTFT_CUDA
  cuda = true;
  std::istringstream list(FASTFT_CUDA_ARCHS);
  for (std::string arch; std::getline(list, arch, ',');) archs.push_back(arch);
#endif
#ifdef FASTFT_X86
  paths = {"scalar", "avx2", "avx512"};
#endif
  py::dict d;
  d["version"] = FASTFT_VERSION;
  d["cuda"] = cuda;
  d["cuda_archs"] = archs;
#ifdef __clang__
  d["compiler"] = "clang " __clang_version__;
#else
  d["compiler"] = "gcc " __VERSION__;
#endif
  d["openmp"] = true;  // CMake requires it
  d["cpu_paths"] = paths;
  return d;
}

py::dict cpu_features() {
  const fastft::cpu::Features f = fastft::cpu::features();
  py::dict d;
  d["avx2"] = f.avx2;
  d["fma"] = f.fma;
  d["f16c"] = f.f16c;
  d["avx512f"] = f.avx512f;
  d["avx512bw"] = f.avx512bw;
  d["avx512vl"] = f.avx512vl;
  d["avx512dq"] = f.avx512dq;
  d["avx512_bf16"] = f.avx512_bf16;
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using py::arg;
  m.attr("F32") = static_cast<int>(DType::f32);
  m.attr("BF16") = static_cast<int>(DType::bf16);
  m.def("build_info", &build_info);
  m.def("cpu_features", &cpu_features);
  m.def("cpu_path", [] { return std::string(fastft::cpu::kernels().name); });
  m.def("adamw", &adamw, arg("device"), arg("stream"), arg("params"), arg("grads"), arg("exp_avgs"), arg("exp_avg_sqs"),
        arg("max_exp_avg_sqs"), arg("copies"), arg("remainders"), arg("exp_avg_scales"), arg("exp_avg_sq_scales"),
        arg("steps"), arg("numels"), arg("offsets"), arg("param_dtype"), arg("grad_dtype"), arg("param_store"),
        arg("state_store"), arg("seed"), arg("lr"), arg("lr_ptr"), arg("beta1"), arg("beta2"), arg("eps"),
        arg("weight_decay"), arg("decoupled"), arg("maximize"), arg("grad_scale"), arg("found_inf"), arg("num_threads"),
        arg("scratch") = Address{0});
  m.attr("ADAMW_SCRATCH") = fastft::kAdamWScratch;
  m.def("cross_entropy", &cross_entropy, py::kw_only(), arg("device"), arg("stream"), arg("logits"), arg("dtype"),
        arg("rows"), arg("vocab"), arg("logits_stride"), arg("target"), arg("class_weight"), arg("token_weight"),
        arg("token_weight_stride"), arg("ignore_index"), arg("label_smoothing"), arg("z_loss"), arg("softcap"),
        arg("logit_scale"), arg("loss"), arg("lse"), arg("grad"), arg("grad_stride"), arg("grad_scale"),
        arg("grad_scale_stride"), arg("bad_row"), arg("num_threads"), arg("variant") = 0);
  m.attr("SUM_SQUARES_SCRATCH") = fastft::kSumSquaresScratch;
  m.def("sum_squares", &sum_squares, py::kw_only(), arg("device"), arg("stream"), arg("tensors"), arg("numels"),
        arg("dtype"), arg("out"), arg("scratch"), arg("num_threads"));
  m.def("rms_forward", &rms_forward, py::kw_only(), arg("x"), arg("residual"), arg("weight"), arg("total"), arg("y"),
        arg("rstd"), arg("rows"), arg("columns"), arg("eps"), arg("dtype"), arg("num_threads"));
  m.def("rms_backward", &rms_backward, py::kw_only(), arg("dy"), arg("x"), arg("weight"), arg("rstd"), arg("extra"),
        arg("dx"), arg("y"), arg("dweight"), arg("rows"), arg("columns"), arg("dtype"), arg("num_threads"));
  m.def("rope", &rope, py::kw_only(), arg("array"), arg("cos"), arg("sin"), arg("rows"), arg("stride"), arg("heads"),
        arg("dim"), arg("period"), arg("table_stride"), arg("back"), arg("dtype"), arg("num_threads"));
  m.def("gated_forward", &gated_forward, py::kw_only(), arg("gate"), arg("up"), arg("out"), arg("rows"), arg("width"),
        arg("stride"), arg("dtype"), arg("num_threads"));
  m.def("gated_backward", &gated_backward, py::kw_only(), arg("gate"), arg("up"), arg("dout"), arg("out"), arg("dgate"),
        arg("dup"), arg("rows"), arg("width"), arg("stride"), arg("dtype"), arg("num_threads"));
  m.def("attention_forward", &attention_forward, py::kw_only(), arg("q"), arg("k"), arg("v"), arg("q_stride"),
        arg("k_stride"), arg("v_stride"), arg("bounds"), arg("documents"), arg("tokens"), arg("heads"), arg("groups"),
        arg("dim"), arg("scale"), arg("window"), arg("out"), arg("lse"), arg("dtype"), arg("num_threads"));
  m.def("attention_backward", &attention_backward, py::kw_only(), arg("q"), arg("k"), arg("v"), arg("q_stride"),
        arg("k_stride"), arg("v_stride"), arg("bounds"), arg("documents"), arg("tokens"), arg("heads"), arg("groups"),
        arg("dim"), arg("scale"), arg("window"), arg("out"), arg("lse"), arg("dtype"), arg("num_threads"), arg("grad"),
        arg("dq"), arg("dk"), arg("dv"), arg("dq_stride"), arg("dk_stride"), arg("dv_stride"));
  m.def("stream_4r3w", &stream_4r3w, py::kw_only(), arg("p"), arg("g"), arg("m"), arg("v"), arg("n"),
        arg("num_threads"));
}
