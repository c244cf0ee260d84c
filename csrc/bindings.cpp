// editr2_kernels._native: checked raw-pointer launchers. Pointers are Python ints (0 = absent), so the
// module knows no tensor library and one build serves every torch version. The GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"
#include "cpu/ops.h"
#include "philox.h"

namespace py = pybind11;
using namespace editr2;

namespace {

template <class T>
T* at(uintptr_t p) {
  return reinterpret_cast<T*>(p);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of editr2_kernels; dtype codes are 0 float32, 1 bfloat16, 2 float16.";
  using release = py::call_guard<py::gil_scoped_release>;

  m.def("isa", [] { return active_kernels().name; }, "Instruction set in use.");
  m.def("supported_isas", &supported_isas, "Instruction sets this processor and build have.");
  m.def("set_isa", &set_isa, py::arg("name"), "Choose the instruction set (for tests).");

  m.def(
      "philox_bits",
      [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
        uint32_t c[4] = {c0, c1, c2, c3};
        philox4x32_10<ScalarLanes>(c, k0, k1);
        return py::make_tuple(c[0], c[1], c[2], c[3]);
      },
      py::arg("c0"), py::arg("c1"), py::arg("c2"), py::arg("c3"), py::arg("k0"), py::arg("k1"),
      "The four raw words of one Philox4x32-10 block.");

  m.def(
      "philox_normal",
      [](uintptr_t seed, uintptr_t step, uintptr_t out, int out_dtype, int64_t batch, int64_t n,
         int threads) {
        philox_normal({at<int64_t>(seed), at<int64_t>(step), {at<void>(out), out_dtype}, n}, batch,
                      threads);
      },
      py::arg("seed_ptr"), py::arg("step_ptr"), py::arg("out_ptr"), py::arg("out_dtype"),
      py::arg("B"), py::arg("N"), py::arg("threads"), release());

  m.def(
      "sde_step",
      [](uintptr_t x, int x_dtype, int64_t x_stride, uintptr_t v, int v_dtype, int64_t v_stride,
         uintptr_t noise, int noise_dtype, int64_t noise_stride, uintptr_t table, int64_t rows,
         uintptr_t step_index, uintptr_t seed, uintptr_t out, int out_dtype, uintptr_t log_prob,
         int64_t batch, int64_t n, int threads) {
        sde_step({{at<void>(x), x_dtype, x_stride},
                  {at<void>(v), v_dtype, v_stride},
                  {at<void>(noise), noise_dtype, noise_stride},
                  at<float>(table),
                  at<int64_t>(step_index),
                  at<int64_t>(seed),
                  {at<void>(out), out_dtype},
                  n},
                 rows, at<float>(log_prob), batch, threads);
      },
      py::arg("x_ptr"), py::arg("x_dtype"), py::arg("x_stride"), py::arg("v_ptr"),
      py::arg("v_dtype"), py::arg("v_stride"), py::arg("noise_ptr"), py::arg("noise_dtype"),
      py::arg("noise_stride"), py::arg("table_ptr"), py::arg("rows"), py::arg("step_index_ptr"),
      py::arg("seed_ptr"), py::arg("out_ptr"), py::arg("out_dtype"), py::arg("log_prob_ptr"),
      py::arg("B"), py::arg("N"), py::arg("threads"), release());

  m.def(
      "sde_log_prob",
      [](uintptr_t x, int x_dtype, int64_t x_stride, uintptr_t xn, int xn_dtype, int64_t xn_stride,
         uintptr_t v, int v_dtype, int64_t v_stride, uintptr_t vref, int vref_dtype,
         int64_t vref_stride, uintptr_t table, int64_t rows, uintptr_t step_index,
         uintptr_t log_prob, uintptr_t mean_diff, int64_t batch, int64_t n, int threads) {
        sde_log_prob({{at<void>(x), x_dtype, x_stride},
                      {at<void>(xn), xn_dtype, xn_stride},
                      {at<void>(v), v_dtype, v_stride},
                      {at<void>(vref), vref_dtype, vref_stride},
                      at<float>(table),
                      at<int64_t>(step_index),
                      nullptr,
                      nullptr,
                      {nullptr, kFloat32},
                      n},
                     rows, at<float>(log_prob), at<float>(mean_diff), batch, threads);
      },
      py::arg("x_ptr"), py::arg("x_dtype"), py::arg("x_stride"), py::arg("xn_ptr"),
      py::arg("xn_dtype"), py::arg("xn_stride"), py::arg("v_ptr"), py::arg("v_dtype"),
      py::arg("v_stride"), py::arg("vref_ptr"), py::arg("vref_dtype"), py::arg("vref_stride"),
      py::arg("table_ptr"), py::arg("rows"), py::arg("step_index_ptr"), py::arg("log_prob_ptr"),
      py::arg("mean_diff_ptr"), py::arg("B"), py::arg("N"), py::arg("threads"), release());

  m.def(
      "sde_log_prob_backward",
      [](uintptr_t x, int x_dtype, int64_t x_stride, uintptr_t xn, int xn_dtype, int64_t xn_stride,
         uintptr_t v, int v_dtype, int64_t v_stride, uintptr_t vref, int vref_dtype,
         int64_t vref_stride, uintptr_t table, int64_t rows, uintptr_t step_index,
         uintptr_t grad_log_prob, uintptr_t grad_mean_diff, uintptr_t grad_v, int grad_v_dtype,
         int64_t batch, int64_t n, int threads) {
        sde_log_prob_backward({{at<void>(x), x_dtype, x_stride},
                               {at<void>(xn), xn_dtype, xn_stride},
                               {at<void>(v), v_dtype, v_stride},
                               {at<void>(vref), vref_dtype, vref_stride},
                               at<float>(table),
                               at<int64_t>(step_index),
                               at<float>(grad_log_prob),
                               at<float>(grad_mean_diff),
                               {at<void>(grad_v), grad_v_dtype},
                               n},
                              rows, batch, threads);
      },
      py::arg("x_ptr"), py::arg("x_dtype"), py::arg("x_stride"), py::arg("xn_ptr"),
      py::arg("xn_dtype"), py::arg("xn_stride"), py::arg("v_ptr"), py::arg("v_dtype"),
      py::arg("v_stride"), py::arg("vref_ptr"), py::arg("vref_dtype"), py::arg("vref_stride"),
      py::arg("table_ptr"), py::arg("rows"), py::arg("step_index_ptr"),
      py::arg("grad_log_prob_ptr"), py::arg("grad_mean_diff_ptr"), py::arg("grad_v_ptr"),
      py::arg("grad_v_dtype"), py::arg("B"), py::arg("N"), py::arg("threads"), release());

  m.def(
      "group_advantage",
      [](uintptr_t scores, uintptr_t group, uintptr_t weights, uintptr_t mask, int aggregate,
         int fusion, int baseline, int std, bool unbiased, float eps, float clip, bool broadcast,
         int filter_reward, bool filter_in_statistics, uintptr_t advantage, uintptr_t mask_out,
         int64_t n, int64_t turns, int64_t rewards) {
        group_advantage({at<float>(scores), at<int64_t>(group), at<float>(weights),
                         at<uint8_t>(mask), aggregate, fusion, baseline, std, unbiased, eps, clip,
                         broadcast, filter_reward, filter_in_statistics, at<float>(advantage),
                         at<uint8_t>(mask_out), n, turns, rewards});
      },
      py::arg("scores_ptr"), py::arg("group_ptr"), py::arg("weights_ptr"), py::arg("mask_ptr"),
      py::arg("aggregate"), py::arg("fusion"), py::arg("baseline"), py::arg("std"),
      py::arg("unbiased"), py::arg("eps"), py::arg("clip"), py::arg("broadcast"),
      py::arg("filter_reward"), py::arg("filter_in_statistics"), py::arg("advantage_ptr"),
      py::arg("mask_out_ptr"), py::arg("N"), py::arg("T"), py::arg("K"), release());
}
